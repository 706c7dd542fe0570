"""Run folders: make, resume, find and summarise them."""
