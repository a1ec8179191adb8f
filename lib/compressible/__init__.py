"""Compressible Dynamics: training primitives for deep low-rank factorizations.

The public API; each name is imported when it is first used, so that the command line starts without PyTorch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MatrixCompletion": "problems",
    "MatrixFactorization": "problems",
    "MatrixSensing": "problems",
    "SparseCompletion": "sparse",
    "stack_problems": "problems",
    "low_rank_target": "sampling",
    "random_mask": "sampling",
    "sparse_low_rank": "sampling",
    "gaussian_operators": "sampling",
    "orthogonal_factors": "factors",
    "product": "factors",
    "stack_factors": "factors",
    "compress_from_gradient": "compress",
    "compress_spectral": "compress",
    "descend": "descent",
    "DivergenceError": "history",
    "History": "history",
    "DeepLoraConfig": "adapter_config",
    "get_deep_lora_model": "adapters",
    "param_groups": "adapters",
    "merge_and_unload": "adapter_merge",
    "compress_adapters": "adapter_start",
    "FineTuningRun": "tuning_runs",
    "RunHistory": "tuning_runs",
    "fine_tune": "finetune",
    "save_adapter": "adapter_files",
    "load_adapter": "adapter_files",
    "save_peft_adapter": "adapter_files",
    "Examples": "tasks",
    "Task": "tasks",
    "load_task": "tasks",
    "load_encoder": "encoders",
    "load_for_task": "encoders",
    "head_layers": "encoders",
    "load_seq2seq": "encoders",
    "load_tokenizer": "encoders",
    "compare_starts": "compare",
    "stack_starts": "compare",
}
_MODULES = {
    "baselines", "claims", "compare", "data", "figures", "parameters", "ratings", "recommend", "runs", "spectra",
    "theory",
}  # fmt: skip

__all__ = sorted([*_HOME, *_MODULES])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
