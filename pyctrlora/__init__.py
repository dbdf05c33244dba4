"""pyctrlora: curvature-whitened, trust-region training of LoRA adapters on a C++ engine.

Example:
    >>> import torch, pyctrlora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> model = pyctrlora.add_lora(model, rank=2)
    >>> opt = pyctrlora.CTROptimizer(model.parameters(), lr=0.1)
    >>> model(torch.ones(4, 8)).square().mean().backward()
    >>> opt.step()
"""

# ruff: noqa: E402  (the torch version is checked before anything loads the extension)
from pyctrlora._torch_version import cmake_folder, load_extension

load_extension()

from pyctrlora import plot
from pyctrlora.attach import Attachment, attach
from pyctrlora.fuse import fuse, unfuse
from pyctrlora.init import cg_init
from pyctrlora.init_report import InitReport
from pyctrlora.layers import LoRALinear, add_lora
from pyctrlora.optimizer import CTROptimizer
from pyctrlora.options import EngineOptions
from pyctrlora.ranks import compact, prepare_for_resume
from pyctrlora.saving import save_adapter

#: Lets CMake's find_package(ctrlora) find the library, the headers and torch:
#: `cmake -DCMAKE_PREFIX_PATH=$(python -c "import pyctrlora as p; print(p.cmake_prefix_path)") ...`
cmake_prefix_path: str = cmake_folder()

__all__ = [
    "Attachment",
    "CTROptimizer",
    "EngineOptions",
    "InitReport",
    "LoRALinear",
    "add_lora",
    "attach",
    "cg_init",
    "cmake_prefix_path",
    "compact",
    "fuse",
    "plot",
    "prepare_for_resume",
    "save_adapter",
    "unfuse",
]
