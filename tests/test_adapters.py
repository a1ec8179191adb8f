"""Deep LoRA on plain and transformers' models: starts, compression, training, merging, files, stock peft."""

import copy
import json
from itertools import pairwise

import distributed_helpers
import pytest
import torch
from torch import nn

import compressible as cd
from compressible.adapters.compressed_init import compressed_frames, span_and_image
from compressible.adapters.layer import Adapter, adapters, is_transposed
from compressible.recovery.problems import DenseProblem

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def _mlp(seed=0, sizes=(12, 20, 9, 4)):
    torch.manual_seed(seed)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _bert(seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, num_labels=3, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def _t5():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
                                   decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def _gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    return transformers.GPT2LMHeadModel(config).eval()


def _inputs(kind="bert"):
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"labels": ids} if kind != "bert" else {"labels": torch.tensor([0, 1, 2])})


MODELS = {"bert": _bert, "t5": _t5, "gpt2": _gpt2}


def _adapted(kind="bert", **options):
    config = cd.DeepLoraConfig(**({"r": 4} | options))
    model = cd.get_deep_lora_model(MODELS[kind](), config, torch.Generator().manual_seed(3))
    if config.variant == "compressed":
        cd.compress_adapters(model, lambda: model(**_inputs(kind)).loss, generator=torch.Generator().manual_seed(4))
    return model


def _train(model, kind="bert", steps=5, lr=1e-1):
    optimiser = torch.optim.AdamW(cd.param_groups(model, lr))
    losses = []
    for _ in range(steps):
        loss = model(**_inputs(kind)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("bad", "match"), [
    ({"r": 0}, "r is 0"), ({"r": 5}, "r is 5, expected even"), ({"depth": 1}, "depth is 1"),
    ({"variant": "wide"}, "'wide'.*compressed, thin, full"), ({"init_scale": 0.0}, "init_scale is 0.0"),
    ({"depth": 2}, 'variant is .compressed., expected "thin"'), ({"lora_alpha": 8}, "lora_alpha is 8"),
    ({"outer_ratio": -1.0}, "outer_ratio is -1.0"), ({"init_lora_weights": "paper"}, "init_lora_weights is 'paper'"),
    ({"use_rslora": True}, "use_rslora is True"), ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
])  # fmt: skip
def test_configs_that_make_no_sense_are_refused_with_the_value(bad, match):
    with pytest.raises(ValueError, match=match):
        cd.DeepLoraConfig(**bad)


def test_the_old_name_of_outer_ratio_is_understood_with_a_warning(tmp_path):
    with pytest.warns(DeprecationWarning, match="outer_ratio"):
        config = cd.DeepLoraConfig(r=4, lr_ratio=0.5)
    assert config == cd.DeepLoraConfig(r=4, outer_ratio=0.5)
    with pytest.warns(DeprecationWarning, match="outer_ratio"):
        assert config.lr_ratio == 0.5
    with pytest.raises(TypeError, match="expected one of them"):
        cd.DeepLoraConfig(lr_ratio=0.5, outer_ratio=0.5)
    cd.save_adapter(_adapted(variant="thin", outer_ratio=0.25), tmp_path)
    file = tmp_path / "deep_lora.json"  # as it was written before
    file.write_text(file.read_text().replace("outer_ratio", "lr_ratio"))
    groups = cd.param_groups(cd.load_adapter(_bert(), tmp_path), 1e-2)
    assert {group["name"]: group["lr"] for group in groups} == {"inner": 1e-2, "outer": pytest.approx(2.5e-3)}


def test_fields_that_peft_has_are_named_as_there():
    theirs = {field.name for field in __import__("dataclasses").fields(peft.LoraConfig)}
    ours = set(vars(cd.DeepLoraConfig()))
    assert ours - theirs == {"depth", "init_scale", "variant", "outer_ratio", "embeddings"}


def test_only_factors_and_saved_modules_train():
    model = _adapted(modules_to_save=["classifier"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".factors." in name or name.startswith("classifier.") for name in trained)
    assert {"classifier.weight", "classifier.bias"} <= trained
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = _train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained and losses[-1] < losses[0]


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_means_what_peft_means(kind):
    task = {"task_type": "SEQ_CLS"} if kind == "bert" else {}
    theirs = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(target_modules="all-linear", **task))
    names = {name.removeprefix("base_model.model.") for name, module in theirs.named_modules()
             if isinstance(module, peft.tuners.lora.LoraLayer)}  # fmt: skip
    assert set(adapters(_adapted(kind, variant="thin", **task))) == names


def test_targets_by_end_of_name_regular_expression_and_exclusion():
    by_end = adapters(_adapted(target_modules=["query", "value"]))
    assert len(by_end) == 4 and all(name.endswith(("query", "value")) for name in by_end)
    by_pattern = adapters(_adapted(target_modules=r".*layer\.1\..*(query|key)"))
    assert sorted(by_pattern) == [f"bert.encoder.layer.1.attention.self.{name}" for name in ("key", "query")]
    fewer = adapters(_adapted(target_modules=["query", "value"], exclude_modules=r".*layer\.0\..*"))
    assert all("layer.1" in name for name in fewer) and len(fewer) == 2
    with pytest.raises(ValueError, match="matches no layer"):
        _adapted(target_modules=["nothing"])
    with pytest.raises(ValueError, match="LayerNorm"):
        _adapted(target_modules=["LayerNorm"])
    with pytest.raises(ValueError, match=r"classifier.*\(3, 16\).*r / 2 = 4"):
        cd.get_deep_lora_model(_bert(), cd.DeepLoraConfig(r=8))


@pytest.mark.parametrize(("variant", "width"), [("full", 16), ("thin", 4)])
def test_orthogonal_starts_have_the_papers_scale(variant, width):
    model = _adapted(variant=variant, target_modules=["query", "output.dense"], init_scale=0.1)
    for adapter in adapters(model).values():
        m, n = adapter.shape
        k = min(m, n) if variant == "full" else width
        assert [tuple(f.shape) for f in adapter.factors] == [(k, n), (k, k), (m, k)]
        values = torch.linalg.svdvals(adapter.update().detach())[: min(k, m, n)]
        torch.testing.assert_close(values, torch.full_like(values, 1e-3), rtol=1e-4, atol=1e-8)


def test_lora_starts_and_scalings():
    paper = adapters(_adapted(depth=2, variant="thin", init_lora_weights="paper"))
    standard = adapters(_adapted(depth=2, variant="thin", lora_alpha=16))
    rs = adapters(_adapted(depth=2, variant="thin", lora_alpha=16, use_rslora=True))
    for a, b, c in zip(paper.values(), standard.values(), rs.values(), strict=True):
        assert not a.factors[0].any() and 0.5 < a.factors[1].std() < 1.5 and a.config.scaling == 1
        assert b.factors[0].abs().max() <= b.shape[1] ** -0.5 and not b.factors[1].any()
        assert b.config.scaling == 4 and c.config.scaling == 8
        assert not a.update().any() and not b.update().any()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("variant", ["thin", "full", "compressed"])
def test_the_update_in_the_forward_pass_is_the_one_that_merging_adds(kind, variant):
    model = _adapted(kind, variant=variant, init_scale=0.3)
    _train(model, kind, steps=2)
    model.eval()
    inputs = _inputs(kind)
    with torch.no_grad():
        before = model(**inputs).logits
    merged = cd.merge_and_unload(model, inputs)
    assert not adapters(merged) and not hasattr(merged, "deep_lora_config")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, before, rtol=1e-4, atol=1e-5)
        plain = MODELS[kind]()(**inputs).logits
    assert (plain - before).abs().max() > 1e-3


def test_embeddings_are_adapted_on_request_and_merge():
    model = _adapted(embeddings=True, init_scale=0.3)
    names = [name for name, adapter in adapters(model).items() if isinstance(adapter.base, nn.Embedding)]
    assert "bert.embeddings.word_embeddings" in names
    _train(model, steps=2)
    cd.merge_and_unload(model, _inputs())


def test_merging_refuses_what_it_would_spoil():
    model = _adapted(init_scale=0.3)
    _train(model, steps=2)
    head = adapters(model)["classifier"]
    head.forward = lambda x: head.base(x) * 1.5  # a layer whose forward pass is not its weight
    with pytest.raises(RuntimeError, match="merged model differs by"):
        cd.merge_and_unload(model, _inputs())


def _literal(m, n, depth, rank, seed):
    """The construction of the paper on explicit full-width factors, for one layer with a linear loss <G, X>."""
    g = torch.Generator().manual_seed(seed)
    gradient = torch.randn(m, n, generator=g, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -3, n, dtype=torch.float64)
    )
    factors = cd.orthogonal_factors((m, n), depth, None, 1e-2, g)

    class Linear(DenseProblem):
        def gradient(self, product, out=None):
            return gradient

    problem = Linear()
    problem.shape, problem.batch_shape = (m, n), ()
    return gradient, factors, cd.compress_from_gradient(problem, factors, rank)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (12, 16), (16, 11)])
def test_the_closed_form_is_the_literal_construction(m, n):
    gradient, factors, small = _literal(m, n, 3, 2, seed=m + n)
    q = cd.product(factors) / 1e-6
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    left, right = left[:, :2], right[:2].mT
    if m <= n:
        first = q.mT @ left
        beside = q @ torch.linalg.qr(right - first @ (first.mT @ right)).Q
        v, u = span_and_image(first, right, left, beside)
    else:
        first = q @ right
        beside = q.mT @ torch.linalg.qr(left - first @ (first.mT @ left)).Q
        u, v = span_and_image(first, left, right, beside)
    expected = small[-1] @ small[0]
    torch.testing.assert_close(u @ v.mT, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (12, 16), (16, 11)])
def test_drawn_frames_have_what_the_closed_form_needs(m, n):
    g = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(m, 2, generator=g)).Q
    right = torch.linalg.qr(torch.randn(n, 2, generator=g)).Q
    v, u = compressed_frames(left, right, (m, n), g)
    eye = torch.eye(4)
    square = v if m <= n else u  # the side on which the width is max(m, n)
    torch.testing.assert_close(square.mT @ square, eye, rtol=1e-4, atol=1e-5)
    if m == n:
        torch.testing.assert_close(u.mT @ u, eye, rtol=1e-4, atol=1e-5)
    inside = v @ (v.mT @ right) if m <= n else u @ (u.mT @ left)
    torch.testing.assert_close(inside, right if m <= n else left, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(torch.cat([u, left], 1)) == 4
    assert torch.linalg.matrix_rank(torch.cat([v, right], 1)) == 4


@pytest.mark.parametrize("kind", MODELS)
def test_compression_takes_the_gradient_of_every_layer(kind):
    model = MODELS[kind]()
    inputs = _inputs(kind)
    weights = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
    model(**inputs).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    model = _adapted(kind)
    for name, adapter in adapters(model).items():
        gradient = gradients[name].mT if is_transposed(adapter.base) else gradients[name]
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        if values[1] < 1e-7 or values[1] - values[2] < 1e-2 * values[0]:
            continue  # the directions are not well defined
        v, u = adapter.factors[0].detach().mT, adapter.factors[-1].detach()
        spans = torch.linalg.qr(v).Q, torch.linalg.qr(u).Q
        for span, leading in zip(spans, (right[:2].mT, left[:, :2]), strict=True):
            torch.testing.assert_close(span @ (span.mT @ leading), leading, rtol=1e-2, atol=1e-2)
        assert [tuple(f.shape) for f in adapter.factors[1:-1]] == [(4, 4)] * 3
        torch.testing.assert_close(adapter.factors[1].detach(), 1e-3 * torch.eye(4))
    assert all(p.grad is None for p in model.parameters())


def test_several_batches_accumulate_and_the_seed_decides():
    first = torch.Generator().manual_seed(0)
    model, other = (cd.get_deep_lora_model(_bert(), cd.DeepLoraConfig(r=4)) for _ in range(2))
    report = cd.compress_adapters(model, lambda: model(**_inputs()).loss, batches=3, generator=first)
    cd.compress_adapters(other, lambda: other(**_inputs()).loss, generator=torch.Generator().manual_seed(0))
    assert report["seconds"] > 0
    one, two = (adapters(each)["classifier"].factors[0].detach() for each in (model, other))
    torch.testing.assert_close(one.mT @ one, two.mT @ two, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="batches is 0"):
        cd.compress_adapters(model, lambda: None, batches=0)


def test_forgetting_to_compress_says_what_to_do():
    model = cd.get_deep_lora_model(_bert(), cd.DeepLoraConfig(r=4))
    with pytest.raises(RuntimeError, match="call compress_adapters"):
        model(**_inputs())
    with pytest.raises(RuntimeError, match="no gradient reached"):
        cd.compress_adapters(model, lambda: model.classifier(torch.randn(2, 16)).sum())


def test_groups_hold_every_trained_parameter_once_at_its_rate():
    model = _adapted(modules_to_save=["classifier"])
    groups = cd.param_groups(model, 1e-2)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"inner": 1e-2, "outer": pytest.approx(1e-4), "saved": 1e-2}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in model.parameters())
    thin = cd.param_groups(_adapted(variant="thin"), 1e-4)
    assert {group["lr"] for group in thin} == {1e-4}
    with pytest.raises(ValueError, match="lr is 0"):
        cd.param_groups(model, 0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [
    {"variant": "thin", "init_scale": 0.3}, {"variant": "compressed", "init_scale": 0.3}, {"variant": "compressed"},
    {"depth": 2, "variant": "thin", "lora_alpha": 16, "use_rslora": True},
])  # fmt: skip
def test_stock_peft_loads_the_export(kind, options, tmp_path):
    task = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]} if kind == "bert" else {}
    model = _adapted(kind, **options, **task)
    _train(model, kind)
    model.eval()
    with torch.no_grad():
        expected = model(**_inputs(kind)).logits
    cd.save_peft_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**_inputs(kind)).logits, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_embeddings_reach_peft_too(tmp_path):
    model = _adapted(embeddings=True, init_scale=0.3, exclude_modules=["position_embeddings", "token_type_embeddings"])
    _train(model)
    model.eval()
    cd.save_peft_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_bert(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**_inputs()).logits, model(**_inputs()).logits, rtol=1e-5, atol=1e-5)


def test_full_variants_are_not_exported(tmp_path):
    with pytest.raises(ValueError, match='"full"'):
        cd.save_peft_adapter(_adapted(variant="full"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["thin", "full", "compressed"])
def test_training_resumes_from_files(variant, tmp_path):
    model = _adapted(variant=variant, modules_to_save=["classifier"])
    _train(model, steps=2)
    cd.save_adapter(model, tmp_path)
    again = cd.load_adapter(_bert(), tmp_path)
    for (name, mine), (other, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(mine, theirs) and mine.requires_grad == theirs.requires_grad
    assert _train(model, steps=3) == pytest.approx(_train(again, steps=3), rel=1e-3)  # a file's tensors lie elsewhere
    other = _gpt2()
    with pytest.raises(ValueError, match="differ in"):
        cd.load_adapter(other, tmp_path)
    assert not adapters(other) and all(p.requires_grad for p in other.parameters())
    shorter = _bert()
    shorter.bert.encoder.layer = shorter.bert.encoder.layer[:1]
    with pytest.raises(ValueError, match="differ in"):
        cd.load_adapter(shorter, tmp_path)


def test_a_batch_for_a_compressed_start_needs_compressed_adapters():
    with pytest.raises(ValueError, match="no adapter of variant 'compressed'"):
        cd.compress_adapters(_adapted(variant="thin"), lambda: torch.zeros(()))


def test_float16_is_refused_and_bfloat16_trains():
    model = _adapted().half()
    with pytest.raises(ValueError, match="float16"):
        model(**_inputs())
    model = _adapted(init_scale=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = _train(model)
    assert losses[-1] < losses[0]


def test_the_chain_survives_autocast_in_float32():
    model = _adapted()
    adapter = next(iter(adapters(model).values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter.update().dtype == torch.float32
    torch.testing.assert_close(torch.linalg.svdvals(adapter.update())[0].item(), 1e-9, rtol=1e-3, atol=0)


def test_plain_modules_work_and_compile():
    model = cd.get_deep_lora_model(_mlp(), cd.DeepLoraConfig(r=4, variant="thin", init_scale=0.3))
    x = torch.randn(5, 12)
    assert all(isinstance(model[i], Adapter) for i in (0, 2, 4))
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_trainer_takes_an_adapted_model(tmp_path):
    model = _adapted(init_scale=0.3)
    rows = [{"input_ids": torch.randint(1, 40, (7,)), "labels": torch.tensor(i % 3)} for i in range(8)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    optimiser = torch.optim.AdamW(cd.param_groups(model, 1e-2))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    transformers.Trainer(model, options, train_dataset=rows, optimizers=(optimiser, None)).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_two_processes_train_like_one_on_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(distributed_helpers.work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x, y = distributed_helpers.batch()
    alone = distributed_helpers.train(distributed_helpers.adapted(), lambda model: model, x, y)
    for a, b, c in zip(first, second, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
