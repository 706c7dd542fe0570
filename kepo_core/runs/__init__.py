"""Run folders: how they are made, found, gone on with, and looked after."""
