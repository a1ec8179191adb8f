"""What surveys of speed say on the goals that were set for them: rates, and ratios to peers in the same run.

Goals are set for one card. On another, or where what they are about was not measured, their keys are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressible.experiments.speed.finetuning import GOAL, OF_PEFT, fastest_peft, rate
from compressible.runtime import devices

CARD = "H200"
LARGE_STACK = 128  # problems from which a stack counts for the goal


def descent_goals(
    out: Mapping[str, Any],
    device: str,
    precisions: Sequence[str],
    dimension: int,
    large_dimension: int,
    sparse_dimension: int,
    stacks: Sequence[int],
) -> dict[str, Any]:
    """Return the goals of a survey of `descend`'s engines, keys "<workload>/<engine>/<what>", by trial (T,).

    "<kind> rate", steps a second, and "<kind> over jax" of the kinds small, large, wide and sparse; "recording",
    "sparse step", "sparse bytes"; "stack rate", problems times steps; "share of gemm". In float64 on CARD alone.
    """
    if CARD not in devices.device_name(device) or precisions[0] != "float64":
        return {}
    names = {
        "small": f"d={dimension} compressed float64",
        "large": f"d={large_dimension} compressed float64",
        "wide": f"d={large_dimension} full width float64",
        "sparse": f"d={sparse_dimension} sparse float64",
    }
    ours = {kind: out[f"{name}/auto/steps"] for kind, name in names.items() if f"{name}/auto/steps" in out}
    return {
        **{f"{kind} rate": 1 / steps for kind, steps in ours.items()},
        **{f"{kind} over jax": steps / ours[kind] for kind, steps in _jax(out, names).items() if kind in ours},
        **_as_named(out, names),
        **_stack_rate(out, dimension, stacks),
        **({"share of gemm": _share_of_gemm(out, names["wide"], ours["wide"])} if "wide" in ours else {}),
    }


def finetuning_goals(
    out: dict[str, Any], device: str, encoders: Sequence[str], precisions: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the goals of a survey of fine-tuning, by trial (T,), in bfloat16; rates are of CARD alone.

    "<encoder> one rate" and "... many rate", steps of a run per second of one and of GOAL compressed runs,
    "... over peft", eager in its fastest precision, and "... over compiled peft"; on any card what `over_lora` gives.
    """
    found = over_lora(out, encoders, precisions[0])
    if CARD not in devices.device_name(device) or precisions[0] != "bfloat16":
        return found
    for encoder in encoders:
        for key, count in {"one": 1, "many": GOAL}.items():
            ours = rate(out, f"{encoder}/{precisions[0]}/{count} x compressed")[1]
            if len(ours):
                found[f"{encoder} {key} rate"] = ours
                for mode, name in {"eager": "peft", "compiled": "compiled peft"}.items():
                    found[f"{encoder} {key} over {name}"] = ours / fastest_peft(out, encoder, precisions, mode)
    return {name: values for name, values in found.items() if np.isfinite(values).all()}


def over_lora(out: Mapping[str, Any], encoders: Sequence[str], precision: str) -> dict[str, np.ndarray]:
    """Return "<encoder> <method> <steps or memory> over LoRA" (T,) of Deep LoRA's variants as methods of peft, eager.

    Seconds of a training step and bytes at its peak over those of peft's LoRA of the same rank in the same precision.
    """
    found: dict[str, np.ndarray] = {}
    for encoder in encoders:
        lora, *others = (f"{encoder}/{precision}/1 x {method}/eager" for method in OF_PEFT)
        for name, method in zip(others, list(OF_PEFT)[1:], strict=True):
            for what in ("steps", "memory"):
                if np.any(out.get(f"{lora}/{what}", 0)) and f"{name}/{what}" in out:  # no bytes are counted on a CPU
                    found[f"{encoder} {method} {what} over LoRA"] = np.atleast_1d(
                        out[f"{name}/{what}"] / out[f"{lora}/{what}"]
                    )
    return found


def _jax(out: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    return {kind: out[f"{name}/jax/steps"] for kind, name in names.items() if f"{name}/jax/steps" in out}


def _as_named(out: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    wanted = {
        "recording": f"{names['small']}/recording",
        "sparse step": f"{names['sparse']}/auto/steps",
        "sparse bytes": f"{names['sparse']}/auto/memory",
    }
    return {goal: out[key] for goal, key in wanted.items() if key in out}


def _stack_rate(out: Mapping[str, Any], dimension: int, stacks: Sequence[int]) -> dict[str, np.ndarray]:
    """The largest rate of a large stack, in steps of a problem per second."""
    keys = {s: f"{s} x d={dimension} compressed float64/auto/steps" for s in stacks if s >= LARGE_STACK}
    rates = [stack / out[key] for stack, key in keys.items() if key in out]
    return {"stack rate": np.max(rates, 0)} if rates else {}


def _share_of_gemm(out: Mapping[str, Any], wide: str, steps: np.ndarray) -> np.ndarray:
    return out[f"{wide}/operations"] / out["float64/gemm of d"] / steps
