"""Prompts that are trained: what peft puts before the tokens, or before the keys, of a run that goes alone."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
import peft
from test_causal import gemma, gpt2, qwen, task, trained_by_peft

import compressible as cd

PROMPTS = {
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "projected": peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.filterwarnings("ignore:.*cannot be stacked")
@pytest.mark.parametrize("make", [qwen, gemma, gpt2])
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_of_a_causal_model_goes_as_peft_s_own(make, kind):
    model, data, run = make(), task(), cd.FineTuningRun(PROMPTS[kind], 1e-2, 3)
    [history] = cd.fine_tune(model, [run], data, 4, 4, evaluate_at=(4,), show_progress=False)
    expected = trained_by_peft(model, run, data, 4, 4)
    assert [*history.losses, history.scores[4]] == pytest.approx(expected, rel=1e-8)
