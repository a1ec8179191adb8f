"""Deep LoRA under Trainer, SFTTrainer and accelerate: training, saving, resuming, the best model, two step sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_helpers import VOCABULARY, adapt, base, batch, close, compress, config, differ, logits, trainable
from torch import nn

import compressible as cd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")


class Rows(torch.utils.data.Dataset):
    """Rows of a batch, one after the other."""

    def __init__(self, kind: str, rows: int = 8, seed: int = 1) -> None:
        self.all = batch(kind, rows, seed)

    def __len__(self) -> int:
        return len(self.all["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.all.items()}


def arguments(folder: Path, **options: Any) -> Any:
    plain = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.05,
             "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
             "seed": 3}  # fmt: skip
    return transformers.TrainingArguments(**(plain | options))


def adapted(kind: str = "bert", variant: str = "compressed", **options: Any) -> nn.Module:
    if kind == "bert":
        options.setdefault("task_type", "SEQ_CLS")
    return adapt(base(kind), batch(kind), variant=variant, **options)


def trainer(model: nn.Module, folder: Path, kind: str = "bert", own: bool = True, **options: Any) -> Any:
    """A Trainer; `own` with the optimiser of the two step sizes."""
    settings = arguments(folder, **options)
    optimizer = cd.create_deep_lora_optimizer(model, torch.optim.AdamW, lr=settings.learning_rate) if own else None
    return transformers.Trainer(model, settings, train_dataset=Rows(kind), eval_dataset=Rows(kind, seed=2),
                                optimizers=(optimizer, None))  # fmt: skip


@pytest.mark.parametrize("variant", ["compressed", "thin", "full"])
def test_trainer_trains_saves_and_the_folder_is_an_adapter(variant, tmp_path):
    model = adapted(variant=variant)
    before, frozen = trainable(model), dict(base("bert").named_parameters())
    mine = trainer(model, tmp_path)
    losses = [mine.train().training_loss, mine.evaluate()["eval_loss"]]
    assert all(loss == loss and loss < 10 for loss in losses)
    for name, value in trainable(model).items():
        differ(value, before[name], 1e-7)
    for name, value in model.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if not value.requires_grad and plain in frozen:
            close(value, frozen[plain], 0)
    mine.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(base("bert"), tmp_path / "saved").eval()
    close(logits(again, batch("bert")), logits(model.eval(), batch("bert")), 1e-6)


@pytest.mark.parametrize(("variant", "own", "compressed_again"), [
    ("compressed", True, False), ("compressed", False, True), ("compressed", True, True), ("thin", True, False),
])  # fmt: skip
def test_a_resumed_run_ends_where_one_run_does(variant, own, compressed_again, tmp_path):
    """Also where the resumed model was never compressed: its factors come from the checkpoint."""
    straight = trainer(adapted(variant=variant), tmp_path / "a", own=own)
    straight.train()
    trainer(first := adapted(variant=variant), tmp_path / "b", own=own, save_strategy="steps", save_steps=2).train()
    close(logits(first.eval(), batch("bert")), logits(straight.model.eval(), batch("bert")))
    if compressed_again:
        model = adapted(variant=variant)
    else:
        torch.manual_seed(9)
        model = peft.get_peft_model(base("bert"), config(variant=variant, task_type="SEQ_CLS"))
    resumed = trainer(model, tmp_path / "b", own=own)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = trainable(straight.model)
    assert trainable(model).keys() == expected.keys()
    for name, value in trainable(model).items():
        close(value, expected[name])


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = adapted()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    # A rate so high that the first step is the best.
    mine = trainer(model, tmp_path, learning_rate=3.0, load_best_model_at_end=True, greater_is_better=False,
                   metric_for_best_model="eval_loss", **options)  # fmt: skip
    mine.train()
    best = mine.state.best_model_checkpoint
    assert best is not None and mine.evaluate()["eval_loss"] == pytest.approx(mine.state.best_metric, rel=1e-5)
    again = peft.PeftModel.from_pretrained(base("bert"), best).eval()
    close(logits(again, batch("bert")), logits(model.eval(), batch("bert")))


def test_the_two_step_sizes_reach_trainer_and_its_schedule(tmp_path):
    model = adapted(lr_ratio=0.1, target_modules=["query", "value"])
    mine = trainer(model, tmp_path, lr_scheduler_type="linear")
    rates: list[list[float]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    mine.add_callback(Watch())
    mine.train()
    names = {id(value): name for name, value in model.named_parameters()}
    groups = mine.optimizer.param_groups
    sets = [{names[id(value)] for value in group["params"]} for group in groups]
    assert set().union(*sets) == set(trainable(model)) and sum(map(len, sets)) == len(trainable(model))
    outer = {i for i, found in enumerate(sets) if any(name.endswith(".0") for name in found)}
    inner = {i for i, found in enumerate(sets) if any(name.endswith(".1") for name in found)}
    assert len(outer) == len(inner) == 1 and not outer & inner
    for row in rates:
        assert row[outer.copy().pop()] == pytest.approx(0.1 * row[inner.copy().pop()])
    assert rates[0][inner.pop()] == pytest.approx(0.05) and rates[-1] < rates[0]


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_the_factory_takes_the_class_and_its_options(kind):
    optimizer = cd.create_deep_lora_optimizer(adapted(), getattr(torch.optim, kind), lr=0.02, weight_decay=0.3)
    assert type(optimizer) is getattr(torch.optim, kind)
    assert max(group["lr"] for group in optimizer.param_groups) == 0.02
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize("options", [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"bf16": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}, {"label_smoothing_factor": 0.1},
], ids=str)  # fmt: skip
def test_trainers_switches_train_all_factors(options, tmp_path):
    torch._dynamo.reset()
    model = adapted("llama", target_modules=["q_proj", "down_proj"])
    before = trainable(model)
    result = trainer(model, tmp_path, "llama", **options).train()
    assert result.training_loss == result.training_loss
    for name, value in trainable(model).items():
        differ(value, before[name], 1e-7)


def test_a_t5_with_adapted_shared_embeddings_is_checkpointed_and_resumed(tmp_path):
    def make() -> nn.Module:
        return adapt(base("t5"), batch("t5"), variant="compressed", target_modules=["embed_tokens", "q", "v"])

    trainer(model := make(), tmp_path, "t5", save_strategy="steps", save_steps=2).train()
    resumed = trainer(make(), tmp_path, "t5")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    close(logits(resumed.model.eval(), batch("t5")), logits(model.eval(), batch("t5")))


# TRL


def words(count: int = VOCABULARY) -> Any:
    """A tokenizer of `count` words, w0 to the last, made here."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, count))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>",
                                                eos_token="</s>", unk_token="<unk>")  # fmt: skip


def sentences(rows: int = 8) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(
        {"text": [" ".join(f"w{4 + (i * j) % 40}" for j in range(3, 9)) for i in range(rows)]}
    )


def sft(model: nn.Module, folder: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    plain = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05,
             "max_length": 8, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": [],
             "disable_tqdm": True}  # fmt: skip
    extra = {name: options.pop(name) for name in ("peft_config", "optimizers") if name in options}
    return trl.SFTTrainer(model, args=trl.SFTConfig(**(plain | options)), train_dataset=sentences(),
                          processing_class=words(), **extra)  # fmt: skip


def test_sfttrainer_takes_an_adapted_model(tmp_path):
    model = adapted("llama", task_type="CAUSAL_LM")
    before = trainable(model)
    optimizer = cd.create_deep_lora_optimizer(model, torch.optim.AdamW, lr=0.05)
    mine = sft(model, tmp_path, optimizers=(optimizer, None))
    mine.train()
    for name, value in trainable(mine.model).items():
        differ(value, before[name], 1e-7)
    mine.save_model(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "saved").eval()
    close(logits(again, batch("llama")), logits(mine.model.eval(), batch("llama")), 1e-5)


def test_sfttrainer_makes_the_adapter_of_a_config_and_it_is_compressed_on_the_trainers_loss(tmp_path):
    mine = sft(base("llama"), tmp_path, peft_config=config(variant="compressed", task_type="CAUSAL_LM"))
    rows = next(iter(mine.get_train_dataloader()))
    with pytest.raises(RuntimeError, match="compress_adapters"):
        mine.train()
    compress(mine.model, lambda: mine.compute_loss(mine.model, rows))
    before = trainable(mine.model)
    mine.train()
    for name, value in trainable(mine.model).items():
        differ(value, before[name], 1e-7)


def test_sfttrainer_takes_a_thin_config_as_loras(tmp_path):
    mine = sft(base("llama"), tmp_path, peft_config=config(task_type="CAUSAL_LM"), gradient_checkpointing=True)
    before = trainable(mine.model)
    mine.train()
    assert before and all((value != before[name]).any() for name, value in trainable(mine.model).items())


@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_sfttrainer_on_a_base_in_four_bits(variant, tmp_path):
    """QLoRA's way: the trainer casts the factors to bfloat16, checkpoints and trains them."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the base")
    base("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits, device_map="cpu")
    model = adapt(peft.prepare_model_for_kbit_training(model), batch("llama"), variant=variant, task_type="CAUSAL_LM")
    mine = sft(model, tmp_path, gradient_checkpointing=True)
    before = trainable(mine.model)
    assert {value.dtype for value in before.values()} == {torch.bfloat16}
    mine.train()
    assert before and all((value != before[name]).any() for name, value in trainable(mine.model).items())


# accelerate


def test_accelerate_prepares_trains_and_keeps_its_state(tmp_path):
    def run(steps: int, resume: Path | None = None, save: Path | None = None) -> nn.Module:
        accelerate.state.AcceleratorState._reset_state(True)
        worker = accelerate.Accelerator(cpu=True)
        model = adapted("llama")
        optimizer = torch.optim.AdamW(cd.param_groups(model, lr=0.05))
        loader = torch.utils.data.DataLoader(Rows("llama"), batch_size=8)
        model, optimizer, loader = worker.prepare(model, optimizer, loader)
        if resume:
            worker.load_state(str(resume))
        for _ in range(steps):
            for rows in loader:
                optimizer.zero_grad()
                worker.backward(model(**rows).loss)
                optimizer.step()
        if save:
            worker.save_state(str(save))
        plain = worker.unwrap_model(model).eval()
        plain.save_pretrained(tmp_path / "adapter", state_dict=worker.get_state_dict(model))
        return plain

    straight = run(4)
    run(2, save=tmp_path / "state")
    resumed = run(2, resume=tmp_path / "state")
    close(logits(resumed, batch("llama")), logits(straight, batch("llama")))
    again = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "adapter").eval()
    close(logits(again, batch("llama")), logits(resumed, batch("llama")), 1e-6)


def test_compression_goes_through_accelerates_wrapping():
    accelerate.state.AcceleratorState._reset_state(True)
    worker = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = worker.prepare(peft.get_peft_model(base("llama"), config(variant="compressed")))
    rows = batch("llama")
    compress(model, lambda: model(**rows).loss)
    before = logits(model, rows)
    optimizer = worker.prepare(torch.optim.AdamW(cd.param_groups(model, lr=0.05)))
    worker.backward(model(**rows).loss)
    optimizer.step()
    differ(logits(model, rows).float(), before.float())
    accelerate.state.AcceleratorState._reset_state(True)
