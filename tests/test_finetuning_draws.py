"""What methods draw by themselves in training comes from the run's seed, wherever the caller's generators stand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
import peft
from test_finetune import bert, task

import compressible as cd
from compressible.finetuning.drawing import random_states
from compressible.finetuning.stacked_pass import StackedPass
from compressible.finetuning.trainer import Trainer

WHAT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
DRAWING = {
    "pvera": peft.PveraConfig(r=4, **WHAT),
    "pvera, scored so": peft.PveraConfig(r=4, sample_at_inference=True, **WHAT),
    "loha": peft.LoHaConfig(r=4, rank_dropout=0.3, **WHAT),
    "lokr": peft.LoKrConfig(r=4, module_dropout=0.3, **WHAT),
    "boft": peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, boft_dropout=0.3, **WHAT),
    "eva": peft.LoraConfig(r=4, init_lora_weights="eva", eva_config=peft.EvaConfig(), **WHAT),
}
CPU = torch.device("cpu")


def trained(kind: str, caller: int, checkpoint: Path | None = None, seed: int = 3, **given) -> cd.RunHistory:
    model, run = bert().float(), cd.FineTuningRun(DRAWING[kind], 1e-2, seed)
    torch.manual_seed(caller)
    random.seed(caller)
    np.random.seed(caller)
    before, marks = random_states(CPU), {"evaluate_at": (0, 6), "show_progress": False}
    [history] = cd.fine_tune(model, [run], task(), 6, 4, checkpoint=checkpoint, **marks | given)
    assert random_states(CPU) == before
    return history


@pytest.mark.filterwarnings("ignore:.*cannot be stacked", "ignore:lora with eva", "ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", DRAWING)
def test_the_caller_s_generators_neither_count_nor_move(kind):
    one, other = (trained(kind, caller) for caller in (1, 2))
    assert one.losses.tolist() == other.losses.tolist() and one.scores == other.scores
    assert trained(kind, 1, seed=4).losses.tolist() != one.losses.tolist()


@pytest.mark.filterwarnings("ignore:.*cannot be stacked")
def test_a_run_that_draws_goes_on_as_it_would_have(tmp_path, monkeypatch):
    whole, advance = trained("pvera", 1), Trainer.advance

    def killed(self, step):
        if step == 4:
            raise KeyboardInterrupt
        advance(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "advance", killed)
        trained("pvera", 2, tmp_path / "state", checkpoint_every=2)
    assert trained("pvera", 3, tmp_path / "state").losses.tolist() == whole.losses.tolist()


@pytest.mark.filterwarnings("ignore:.*cannot be stacked")
@pytest.mark.parametrize(("config", "draws"), [(DRAWING["pvera"], True), (peft.VeraConfig(r=4, **WHAT), False)])
def test_only_what_draws_is_seeded_in_every_step(config, draws):
    stacked = StackedPass(bert(), [cd.FineTuningRun(config, 1e-2)], task(), 2, 4)
    assert not stacked.draws
    Trainer(stacked)
    assert stacked.draws == draws
