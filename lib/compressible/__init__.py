"""Compressible Dynamics: training primitives for deep low-rank factorizations.

The public API; each name is imported when it is first used, so that the command line starts without PyTorch. Deep LoRA
becomes a method of peft when peft is imported, before or after this package: `import compressible` is all that
`peft.PeftModel.from_pretrained` needs.
"""

from importlib import import_module
from typing import Any

from compressible.runtime.when_imported import when_imported

__version__ = "0.2.0"

_HOME = {
    "MatrixCompletion": "recovery.problems",
    "MatrixFactorization": "recovery.problems",
    "MatrixSensing": "recovery.problems",
    "SparseCompletion": "recovery.sparse",
    "stack_problems": "recovery.problems",
    "low_rank_target": "recovery.synthetic",
    "random_mask": "recovery.masks",
    "sparse_low_rank": "recovery.synthetic",
    "gaussian_operators": "recovery.synthetic",
    "orthogonal_factors": "recovery.factors",
    "product": "recovery.factors",
    "stack_factors": "recovery.factors",
    "compress_from_gradient": "recovery.compression",
    "compress_spectral": "recovery.compression",
    "descend": "descent.gradient_descent",
    "DivergenceError": "descent.history",
    "History": "descent.history",
    "DeepLoraConfig": "adapters.config",
    "DeepLoraModel": "adapters.model",
    "param_groups": "finetuning.param_groups",
    "create_deep_lora_optimizer": "finetuning.param_groups",
    "compress_adapters": "adapters.compressed_init",
    "save_as_lora": "finetuning.lora",
    "paper_lora_start": "finetuning.lora",
    "FineTuningRun": "finetuning.run",
    "RunHistory": "finetuning.run",
    "fine_tune": "finetuning.finetune",
    "FactoredConv2d": "networks.layers",
    "FactoredLinear": "networks.layers",
    "factorize": "networks.factorize",
    "Examples": "data.examples",
    "Task": "data.tasks",
    "load_task": "data.tasks",
    "load_causal_task": "data.prompts",
    "load_encoder": "data.pretrained",
    "load_for_task": "data.pretrained",
    "head_layers": "data.pretrained",
    "load_causal_lm": "data.pretrained",
    "load_seq2seq": "data.pretrained",
    "load_tokenizer": "data.pretrained",
    "compare_starts": "experiments.compare",
    "stack_starts": "experiments.compare",
}
_MODULES = {
    "claims": "companion.claims",
    "data": "data",
    "explorer": "companion.explorer",
    "figures": "companion.figures",
    "networks": "networks",
    "parameters": "companion.parameters",
    "ratings": "data.ratings",
    "runs": "companion.runs",
    "spectra": "recovery.spectra",
    "theory": "recovery.theory.invariants",
}

__all__ = sorted([*_HOME, *_MODULES])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        module = import_module(f".{_HOME.get(name) or _MODULES[name]}", __name__)
    except ModuleNotFoundError as error:
        checks = import_module(".runtime.checks", __name__)
        raise ModuleNotFoundError(f"{name} needs more: {checks.lacking(error)}", name=error.name) from error
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


when_imported("peft", lambda: import_module(".adapters.model", __name__))
