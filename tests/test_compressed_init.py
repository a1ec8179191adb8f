"""The compressed start of a peft model: which gradient it takes, what it leaves as it was, and what it refuses."""

import functools
import warnings

import adapter_helpers as helpers
import peft
import pytest
import torch
from torch import nn

import compressible as cd
from compressible.adapters.layer import DeepLoraLayer
from compressible.runtime.starting_factors import compressed_chain
from compressible.runtime.weight_gradients import GradientSink, top_frames


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 6))


def adapted(base: nn.Module | None = None, **options) -> nn.Module:
    settings = {"r": 4, "init_scale": 0.3, "variant": "compressed"} | options
    return peft.get_peft_model(network() if base is None else base, cd.DeepLoraConfig(**settings))


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))


def layers(model: nn.Module) -> dict[str, DeepLoraLayer]:
    root = model.base_model.model
    return {name: module for name, module in root.named_modules() if isinstance(module, DeepLoraLayer)}


def chains(model: nn.Module, name: str = "default") -> dict[str, list[torch.Tensor]]:
    return {at: [f.detach().clone() for f in layer.deep_lora_factors[name]] for at, layer in layers(model).items()}


def compress(model: nn.Module, loss, **options) -> dict:
    return cd.compress_adapters(model, loss, generator=torch.Generator().manual_seed(4), **options)


def expected(base: nn.Module, model: nn.Module, losses) -> dict[str, list[torch.Tensor]]:
    """The factors that autograd's gradients of the whole weights give."""
    generator, found = torch.Generator().manual_seed(4), layers(model)
    weights = {name: base.get_submodule(name).weight.requires_grad_(True) for name in found}
    sum(losses).backward()
    result = {}
    for name, weight in weights.items():
        gradient = weight.grad.mT if found[name].fan_in_fan_out else weight.grad
        settings = found[name].deep_lora_config["default"]
        left, right = top_frames(gradient, settings.r // 2)
        shape = tuple(gradient.shape)
        result[name] = compressed_chain(left, right, shape, settings.depth, settings.init_scale, generator)
    return result


def assert_same_updates(first: dict, second: dict, **bounds) -> None:
    """The same inner factors and the same Gram matrices of the ends: singular vectors may change signs with a bit."""
    assert first.keys() == second.keys()
    for name, chain in first.items():
        pairs = [[one[0].mT @ one[0], *one[1:-1], one[-1] @ one[-1].mT] for one in (chain, second[name])]
        for mine, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, theirs, msg=lambda text, at=name: f"{at}: {text}", **bounds)


# Which gradient


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "vit", "llama"])
def test_factors_are_those_of_the_whole_weights_gradient(kind):
    model, given = adapted(helpers.base(kind), target_modules=helpers.TARGETS[kind], r=2), helpers.batch(kind)
    compress(model, lambda: model(**given).loss)
    base = helpers.base(kind)
    assert_same_updates(chains(model), expected(base, model, [base(**given).loss]), rtol=1e-3, atol=1e-4)
    assert all(factor.dtype is torch.float32 for chain in chains(model).values() for factor in chain)


@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_counts_ids_and_no_padding(padding):
    def table():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 6, padding_idx=padding), nn.Linear(6, 5))

    base, model = table(), adapted(table(), target_modules=["0", "1"])
    ids = torch.tensor([[1, 2, 2, 5], [1, 7, 2, 2]])
    compress(model, lambda: model(ids).exp().sum())
    for layer in layers(model).values():
        assert layer.is_compressed("default")
    assert_same_updates(chains(model), expected(base, model, [base(ids).exp().sum()]), rtol=1e-3, atol=1e-4)


def test_batches_add_up():
    model, base, seeds = adapted(), network(), iter(range(3))
    report = compress(model, lambda: model(batch(next(seeds))).square().sum(), batches=3)
    losses = [base(batch(seed)).square().sum() for seed in range(3)]
    assert_same_updates(chains(model), expected(base, model, losses), rtol=1e-3, atol=1e-4)
    assert report["seconds"] > 0 and report["peak_bytes"] == 0 and report["left_out"] == []


def test_one_gradient_is_alive_at_a_time(monkeypatch):
    alive, add, sinks = [], GradientSink.add, []

    def watched(self, x, grad):
        sinks.append(self)
        add(self, x, grad)
        alive.append(sum(sink.total is not None for sink in sinks))

    monkeypatch.setattr(GradientSink, "add", watched)
    for checkpointed in (False, True):
        model = adapted()
        run = (
            functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False) if checkpointed else model
        )
        compress(model, lambda run=run: run(batch()).square().sum())
    assert len(alive) == 6 and max(alive) == 0  # decomposed before the next layer's comes


@pytest.mark.parametrize("trouble", ["inplace", "unused forward", "first batch only", "no_grad", "disabled", "eval"])
def test_gradients_are_found_whatever_the_loss_does(trouble):
    net = network()
    if trouble == "inplace":
        net[1] = nn.ReLU(inplace=True)
    model, calls = adapted(net), []

    def loss():
        calls.append(0)
        if trouble == "unused forward":
            model(batch(7))
        if trouble == "first batch only" and len(calls) == 2:
            return model.base_model.model[4](torch.zeros(1, 8)).square().sum()
        if trouble == "no_grad":
            with torch.no_grad():
                model(batch(7))
        if trouble == "disabled":
            with torch.no_grad(), model.disable_adapter():
                model(batch(7))
        if trouble == "eval":
            model.eval()
        return model(batch()).square().sum()

    flags = [p.requires_grad for p in model.parameters()]
    compress(model, loss, batches=2 if trouble == "first batch only" else 1)
    base = network()
    if trouble == "inplace":
        base[1] = nn.ReLU()
    wanted = expected(base, model, [base(batch()).square().sum()])
    if trouble == "first batch only":
        wanted = {name: chain for name, chain in wanted.items() if name != "4"}
    assert_same_updates({name: chains(model)[name] for name in wanted}, wanted, rtol=1e-3, atol=1e-4)
    assert model.training and flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    given = helpers.batch("bert")
    plain, other = (adapted(helpers.base("bert"), modules_to_save=["classifier"]) for _ in range(2))
    compress(plain, lambda: plain(**given).loss)
    other.train()
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = [p for p in other.parameters() if p.requires_grad]
    held = torch.full_like(trained[0], 3.0)
    trained[0].grad = held
    compress(other, lambda: other(**given).loss)
    assert_same_updates(chains(plain), chains(other), rtol=1e-4, atol=1e-5)
    assert trained[0].grad is held and held.eq(3).all() and all(p.grad is None for p in trained[1:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_checkpoints_use_many_times(reentrant):
    result = []
    for checkpointed in (True, False):
        model = adapted(target_modules=["2"], r=2)
        layer = model.base_model.model[2]

        def loss(layer=layer, checkpointed=checkpointed):
            x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
            for _ in range(3):
                once = (
                    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
                )
                x = torch.cat([once, once.tanh(), once[:, :4]], 1)
            return x.square().sum()

        compress(model, loss)
        result.append(chains(model))
    assert_same_updates(*result, rtol=1e-3, atol=1e-4)


# Bases of other kinds


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_half_precision_gradients_are_summed_in_float32(way):
    given = helpers.batch("llama")
    base = helpers.base("llama")
    model = adapted(base.bfloat16() if way == "bfloat16" else base, target_modules=helpers.TARGETS["llama"])
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        compress(model, lambda: model(**given).loss)
    whole = adapted(helpers.base("llama"), target_modules=helpers.TARGETS["llama"])
    compress(whole, lambda: whole(**given).loss)
    for name, chain in chains(model).items():
        assert all(factor.dtype is torch.float32 and factor.isfinite().all() for factor in chain)
        aligned = torch.linalg.svdvals(chain[0] @ chains(whole)[name][0].mT)
        assert aligned[0] > 0.9, name  # bfloat16 has three digits, and the random frames are the same


def test_a_quantised_base_gives_nearly_the_same_start():
    torchao = pytest.importorskip("torchao.quantization")
    models = []
    for quantised in (True, False):
        base = helpers.base("llama")
        if quantised:
            torchao.quantize_(base.model, torchao.Int8WeightOnlyConfig())
        model = adapted(base, target_modules=helpers.TARGETS["llama"])
        compress(model, lambda model=model: model(**helpers.batch("llama")).loss)
        models.append(chains(model))
    for name, chain in models[0].items():
        assert torch.linalg.svdvals(chain[0] @ models[1][name][0].mT)[0] > 0.9, name


def test_an_offloaded_layer_has_no_factors_to_set():
    accelerate = pytest.importorskip("accelerate")
    model = adapted(accelerate.cpu_offload(helpers.base("bert"), torch.device("cpu")))  # LoRA's are on meta, too
    with pytest.raises(ValueError, match=r"query' is \(4, 16\) on meta, expected a matrix in memory"):
        compress(model, lambda: model(**helpers.batch("bert")).loss)


@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_model_is_started_uncompiled(inside):
    model, plain = adapted(), adapted()
    compress(plain, lambda: plain(batch()).square().sum())
    if inside:
        model.base_model.model[2] = torch.compile(model.base_model.model[2], backend="eager")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), model.disable_adapter():
        compiled(batch())
    report = compress(compiled, lambda: compiled(batch()).square().sum())
    assert report["left_out"] == []
    named = {name.removesuffix("._orig_mod"): chain for name, chain in chains(model).items()}
    assert_same_updates(named, chains(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(batch()), plain(batch()), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# Several adapters


def test_an_adapter_starts_at_what_the_active_others_make_of_the_model():
    model = adapted(variant="thin")
    second = cd.DeepLoraConfig(r=4, init_scale=0.3, variant="compressed")
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    before = chains(model)
    merged = network()
    for name, layer in layers(model).items():
        merged.get_submodule(name).weight.data += layer.get_delta_weight("default")
    with pytest.raises(RuntimeError, match="'second' of variant 'compressed' has no factors"):
        model(batch())
    compress(model, lambda: model(batch()).square().sum(), adapter_name="second")
    wanted = adapted(merged)
    compress(wanted, lambda: wanted(batch()).square().sum())
    assert_same_updates(chains(model, "second"), chains(wanted), rtol=1e-3, atol=1e-4)
    assert_same_updates(chains(model), before, rtol=0, atol=0)
    assert model.base_model.active_adapters == ["default", "second"]


def test_a_second_compression_asks_first():
    model, other = adapted(), adapted(init_weights=False)
    compress(model, lambda: model(batch()).square().sum())
    before = chains(model)
    for one in (model, other):
        with pytest.raises(ValueError, match="restart=True"):
            compress(one, lambda one=one: one(batch()).square().sum())
    assert_same_updates(chains(model), before, rtol=0, atol=0)
    for one in (model, other):
        held = [*one.parameters()]
        compress(one, lambda one=one: one(batch()).square().sum(), restart=True)
        assert all(a is b for a, b in zip(held, one.parameters(), strict=True))  # an optimiser goes on with them
        assert_same_updates(chains(one), before, rtol=1e-6, atol=1e-6)


# What is refused, and leaves everything as it was


class Pairs(nn.Module):
    """The distance of two outputs, whose gradient is not finite where they are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, a, b):
        apart = nn.functional.dropout(self.body(a) - self.body(b), 0.1, self.training)
        return apart.square().sum(1).sqrt().mean()


def state(model: nn.Module) -> dict:
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(layer.active_adapters == ["default"] for layer in layers(model).values())
    return {"flags": flags, "hooks": hooks, "modes": modes, "values": values, "drawn": torch.get_rng_state()}


def fails(model, equal, a):
    if equal == "stops":
        model.eval()
        raise KeyError("no more rows")
    loss = model(a, a.clone() if equal == "nan gradient" else a.flip(0) + 1)
    return {"nothing": None, "many": loss * torch.ones(2), "nan loss": loss * torch.nan, "detached": loss.detach(),
            "zero": loss * 0.0}.get(equal, loss)  # fmt: skip


@pytest.mark.parametrize(("trouble", "error", "match"), [
    ("stops", KeyError, "no more rows"), ("nothing", ValueError, "NoneType"), ("many", ValueError, r"shape \(2,\)"),
    ("nan loss", RuntimeError, "returned nan"), ("detached", RuntimeError, "no gradient reached the loss"),
    ("nan gradient", RuntimeError, r"gradient of 'body.0' holds nan.*exclude_modules=\['body.0', 'body.2'\]"),
    ("zero", RuntimeError, "any other layer"),
    ("unused", RuntimeError, r"reached 'head' and 0 more.*exclude_modules=\['head'\].*batches"),
])  # fmt: skip
def test_an_error_leaves_the_model_as_it_was(trouble, error, match):
    torch.manual_seed(0)
    model = adapted(Pairs())
    model.base_model.model.body[1].requires_grad_(True).weight.grad = torch.ones(8)
    a, before = torch.randn(4, 8), state(model)
    with pytest.raises(error, match=match):
        compress(model, lambda: fails(model, trouble, a))
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert not any(layer.is_compressed("default") for layer in layers(model).values())
    compress(model, lambda: fails(model, "unused", a) + model.base_model.model.head(a).sum())
    assert all(layer.is_compressed("default") for layer in layers(model).values())


def test_arguments_are_refused_before_work_starts():
    model, loss = adapted(), lambda: pytest.fail("the loss is not asked for")
    for options, match in (
        ({"batches": 0}, "batches is 0"), ({"unreached": "skip"}, "unreached is 'skip'"),
        ({"adapter_name": "other"}, r"adapter_name is 'other', expected one of \['default'\]"),
        ({"generator": 3}, "generator is 3, expected a torch.Generator on the CPU"),
        ({"loss_step": {"loss": 1}}, "loss_step is {'loss': 1}, expected a function"), ({"model": None}, "'NoneType'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            cd.compress_adapters(**{"model": model, "loss_step": loss} | options)
    with pytest.raises(ValueError, match="variant of 'default' is 'thin'"):
        cd.compress_adapters(adapted(variant="thin"), loss)
    with pytest.raises(ValueError, match="variant of 'default' is None"):
        lora = peft.get_peft_model(network(), peft.LoraConfig(target_modules="all-linear"))
        cd.compress_adapters(lora, loss)
    with pytest.raises(ValueError, match="expected one of \\[\\]"):
        cd.compress_adapters(network(), loss)
    done = adapted(init_weights=False)
    done.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        cd.compress_adapters(done, loss, restart=True)
    split = adapted()
    next(iter(split.base_model.model[2].deep_lora_factors["default"])).data = torch.empty(0)  # as FSDP1 does
    with pytest.raises(ValueError, match=r"factor of '2' is \(0,\) on cpu, expected a matrix in memory"):
        cd.compress_adapters(split, loss)


# Layers that the loss does not reach


def mean_pooled(model, ids):
    return model(ids).last_hidden_state.mean(1).square().sum()


def test_an_unused_pooler_is_left_out_for_good(tmp_path):
    import transformers

    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    sizes = helpers.BERT | {"num_labels": 2}

    def encoder():
        torch.manual_seed(0)
        return transformers.BertModel(transformers.BertConfig(**sizes)).eval()

    model, named = adapted(encoder()), adapted(encoder(), exclude_modules=["pooler.dense"])
    with pytest.raises(RuntimeError, match=r'pooler.dense.*unreached="leave_out"'):
        compress(model, lambda: mean_pooled(model, ids))
    report = compress(model, lambda: mean_pooled(model, ids), unreached="leave_out")
    compress(named, lambda: mean_pooled(named, ids))
    assert report["left_out"] == ["pooler.dense"]
    assert_same_updates(chains(model), chains(named), rtol=0, atol=0)
    assert type(model.base_model.model.pooler.dense) is nn.Linear
    optimizer = torch.optim.SGD(cd.param_groups(model, lr=0.1))
    mean_pooled(model, ids).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = peft.PeftModel.from_pretrained(encoder(), tmp_path)
    torch.testing.assert_close(again(ids).pooler_output, model(ids).pooler_output, rtol=0, atol=0)
    torch.testing.assert_close(again.merge_and_unload()(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_left_out_keeps_its_other_adapter():
    model = adapted(variant="thin", target_modules=["0", "2"])
    model.add_adapter("second", cd.DeepLoraConfig(r=4, variant="compressed", target_modules=["0", "2", "4"]))
    model.set_adapter("second")
    root = model.base_model.model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = compress(model, lambda: root[4](root[2](batch().repeat(1, 2)[:, :20])).square().sum(),
                          adapter_name="second", unreached="leave_out")  # fmt: skip
    assert report["left_out"] == ["0"] and list(root[0].deep_lora_factors) == ["default"]
    assert list(root[2].deep_lora_factors) == ["default", "second"] and root[0].active_adapters == ["second"]
    assert not any(p.requires_grad for p in root[0].parameters())
    alone = nn.functional.linear(batch(), root[0].base_layer.weight, root[0].base_layer.bias)
    torch.testing.assert_close(root[0](batch()), alone)
    model.set_adapter("default")
    assert not torch.equal(root[0](batch()), alone) and type(root[4].base_layer) is nn.Linear


@pytest.mark.parametrize("given", [None, ["4"], r"4|nothing"])
def test_what_is_left_out_is_named_exactly(given, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6), nn.Tanh(),
                         nn.Linear(6, 6))  # fmt: skip
    model = adapted(base, exclude_modules=given)
    x = torch.randn(5, 6)
    root = model.base_model.model
    report = compress(model, lambda: root[4](root[2](root[1](x))).square().sum(), unreached="leave_out")
    assert report["left_out"] == ["0"]
    kept = {"1.0", "1.1", "2"} | (set() if given else {"4"})
    assert set(layers(model)) == kept  # a list of names would have taken "1.0", too
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6), nn.Tanh(),
                          nn.Linear(6, 6))  # fmt: skip
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert set(layers(again)) == kept
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert not isinstance(root[0], DeepLoraLayer)


@pytest.mark.parametrize("rows, told", [(3, True), (4, False)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_gradient_of_fewer_directions_than_are_taken_is_told(rows, told, kind):
    model = adapted(r=8).to(kind)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        compress(model, lambda: model(batch()[:rows].to(kind)).square().mean())
    expected = "the first gradient of '0' has rank 3, of which r / 2 = 4 directions are taken, and 2 more layers have"
    assert [expected in str(each.message) for each in found] == [True] * told


def test_rows_of_several_batches_count_together_and_layers_without_a_gradient_do_not():
    model, parts = adapted(r=8), iter(batch().split(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(model, lambda: model(next(parts)).square().mean(), batches=2)
    base = nn.ModuleDict({"used": nn.Linear(12, 8), "idle": nn.Linear(12, 8)})
    other = adapted(base, r=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used = other.base_model.model["used"]
        compress(other, lambda: used(batch()).square().mean(), unreached="leave_out")
