"""Averages kept during training: LAWA, EMA, SWA beside a model that goes on changing."""

import copy
import math
from fractions import Fraction

import pytest
import reference as ref
import torch
from torch import nn

from lawa_core import EMA, LAWA, SWA, LawaError, average, ema, lawa, swa


class Net(nn.Module):
    """Weights, tied weights, a scalar, a frozen matrix, and buffers: integer, boolean, float, and
    one that is not saved."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.wte = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.wte.weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.frozen = nn.Parameter(torch.randn(5, 5), requires_grad=False)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.to(dtype)

    def forward(self, idx):
        return self.head(self.wte(idx)) * self.scale


def walk(net, steps, scale=0.1, seed=1):
    """Change the model in place step after step, as an optimizer does; yields (step, independent
    copy of its state)."""
    rng = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in (net.wte.weight, net.scale, net.running):
                p += scale * torch.randn(p.shape, generator=rng).to(p.dtype)
            net.seen += 1
            net.mask.logical_not_()
        yield step, {n: t.detach().clone() for n, t in net.state_dict().items()}


def follow(online, net, steps, **options):
    """Update at every step; -> {step: state}."""
    states = {}
    for step, state in walk(net, steps, **options):
        online.update(step)
        states[step] = state
    return states


def want_average(states, weights):
    return ref.average([states[s] for s in sorted(weights)], [weights[s] for s in sorted(weights)])


BUILDERS = {
    "lawa": (
        lambda m: LAWA(m, k=3, spacing=4),
        lambda steps, at: ref.lawa_weights(steps, at, 3),
        4,
    ),
    "swa": (
        lambda m: SWA(m, start=4, every=4),
        lambda steps, at: ref.swa_weights(steps, at, 4, 4),
        4,
    ),
    "ema": (
        lambda m: EMA(m, [0.6], every=2, start=2),
        lambda steps, at: ref.ema_weights(steps, at, 0.6),
        2,
    ),
}


def assert_near(kind, got, want):
    """1 unit in the last place; an EMA is rounded to float32 at every update, so a few units of its
    largest value."""
    if kind != "ema":
        return ref.assert_close(got, want)
    assert (
        abs(ref.wide(got) - want).max()
        <= 4 * max(torch.finfo(torch.float32).eps, torch.finfo(got.dtype).eps) * abs(want).max()
    )


kinds = pytest.mark.parametrize("kind", list(BUILDERS))


# ------------------------------------------------------------------ the averages


@kinds
def test_every_fill_of_the_window(kind):
    """After every step: nothing but the grid counts, a part-full window divides by what it holds,
    snapshots are copies."""
    build, weights, every = BUILDERS[kind]
    net = Net()
    online = build(net)
    states = {}
    for step, state in walk(net, 30):
        online.update(step)
        states[step] = state
        grid = [s for s in states if s % every == 0]
        if grid:
            got = online.average()
            want = want_average(states, weights(grid, grid[-1]))
            for name in ("wte.weight", "scale", "running"):
                assert_near(kind, got[name], want[name])


@kinds
def test_names_types_and_buffers(kind):
    """The names of state_dict(), the model's types; integers and booleans from the newest snapshot;
    ties stay tied."""
    net = Net()
    online = BUILDERS[kind][0](net)
    states = follow(online, net, 14)
    got = online.average()
    assert set(got) == set(net.state_dict())
    newest = 12 if kind != "ema" else 14
    assert ref.bits(got["seen"]) == ref.bits(states[newest]["seen"])
    assert ref.bits(got["mask"]) == ref.bits(states[newest]["mask"])
    fresh = Net(seed=9)
    fresh.load_state_dict(got, strict=True)
    assert ref.bits(fresh.head.weight) == ref.bits(fresh.wte.weight) == ref.bits(got["wte.weight"])
    assert fresh.head.weight is fresh.wte.weight


@kinds
def test_online_equals_offline(kind, tmp_path):
    """The same checkpoints written down and averaged from files."""
    build, weights, every = BUILDERS[kind]
    net = Net()
    online = build(net)
    states = follow(online, net, 24)
    grid = [s for s in states if s % every == 0]
    ref.write_run(
        tmp_path, grid, lambda s: {n: t for n, t in states[s].items() if n != "head.weight"}
    )
    scheme = {"lawa": lawa(3, spacing=4), "swa": swa(4, 4), "ema": ema(0.6, every=2, start=2)}[kind]
    offline, now = average(tmp_path, scheme), online.average()
    want = want_average(states, weights(grid, grid[-1]))
    for name in ("wte.weight", "scale", "running"):
        ref.assert_close(offline[name], want[name])
        assert_near(kind, now[name], ref.wide(offline[name]))


@kinds
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_every_type(kind, dtype):
    net = Net(dtype)
    online = BUILDERS[kind][0](net)
    states = follow(online, net, 24)
    grid = [s for s in states if s % BUILDERS[kind][2] == 0]
    want = want_average(states, BUILDERS[kind][1](grid, grid[-1]))
    got = online.average()["wte.weight"]
    assert got.dtype == dtype
    assert_near(kind, got, want["wte.weight"])


def test_the_models_next_step_does_not_reach_the_snapshots():
    """Snapshots on the CPU of a model on the CPU."""
    net = Net()
    online = LAWA(net, k=2, spacing=1)
    states = follow(online, net, 2)
    kept = online.average()
    with torch.no_grad():
        for t in net.state_dict().values():
            t.zero_()
    want = want_average(states, {1: Fraction(1, 2), 2: Fraction(1, 2)})
    ref.assert_close(kept["wte.weight"], want["wte.weight"])
    ref.assert_close(online.average()["wte.weight"], want["wte.weight"])
    kept["wte.weight"].zero_()
    ref.assert_close(online.average()["wte.weight"], want["wte.weight"])


def test_lawa_over_1000_steps_keeps_no_residue():
    """A huge value and a NaN pass through the window; sums that add and subtract would carry them
    for ever."""
    model = nn.Linear(3, 2, bias=False)
    online = LAWA(model, k=5, spacing=2)
    last = []
    for step in range(1, 1001):
        with torch.no_grad():
            model.weight.fill_({400: 1e30, 500: math.nan}.get(step, 1e-3 * (step % 13 + 1)))
        online.update(step)
        if step % 2 == 0:
            last = [*last[-4:], model.weight.detach().clone()]
            if step > 40 and step % 50:
                continue
            want = ref.weighted_sum(last, [Fraction(1, len(last))] * len(last))
            if not any(torch.isnan(t).any() for t in last):
                ref.assert_close(online.average()["weight"], want)
    ref.assert_close(online.average()["weight"], ref.weighted_sum(last, [Fraction(1, 5)] * 5))


def test_swa_over_1000_steps_does_not_drift():
    """A running mean in float32 would be off by tens of units."""
    model = nn.Linear(40, 30, bias=False)
    online = SWA(model)
    total = 0
    rng = torch.Generator().manual_seed(0)
    for step in range(1, 1001):
        with torch.no_grad():
            model.weight.copy_(torch.randn(30, 40, generator=rng) + 100)
        online.update(step)
        total = total + ref.wide(model.weight)
    ref.assert_close(online.average()["weight"], total / 1000)


def test_ema_of_a_bfloat16_model_moves():
    """1 + 0.001 is 1 in bfloat16: an average kept in that type would stay at its first value."""
    model = nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    online = EMA(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    online.update(1)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for step in range(2, 502):
        online.update(step)
    want = 2 - 0.999**500
    got = online.average()["weight"].double()
    assert torch.allclose(got, torch.full_like(got, want), rtol=2**-7, atol=0)


def test_several_betas_side_by_side():
    net = Net()
    betas = [0.5, 0.9, 0.99]
    online = EMA(net, betas)
    states = follow(online, net, 40)
    for beta in betas:
        want = want_average(states, ref.ema_weights(list(states), 40, beta))
        ref.assert_close(online.average(beta)["wte.weight"], want["wte.weight"], 8)
    with pytest.raises(LawaError, match=r"0\.7"):
        online.average(0.7)
    with online.swapped(0.9):
        assert ref.bits(net.wte.weight) == ref.bits(online.average(0.9)["wte.weight"])


def test_frozen_parameters_do_not_change_by_a_bit():
    """beta * x + (1 - beta) * x is not x in floating point."""
    net = Net()
    with torch.no_grad():
        net.frozen.copy_(torch.randn(5, 5, generator=torch.Generator().manual_seed(5)) * 1e-3 + 0.1)
    before = ref.bits(net.frozen)
    averages = [EMA(net, [0.3, 0.9, 0.999]), LAWA(net, k=7, spacing=1), SWA(net)]
    for step, _ in walk(net, 50):
        for online in averages:
            online.update(step)
    for beta in (0.3, 0.9, 0.999):
        assert ref.bits(averages[0].average(beta)["frozen"]) == before
    for online in averages[1:]:
        assert ref.bits(online.average()["frozen"]) == before


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (lambda m: LAWA(m, k=2, spacing=2, start=6), 6, 8),
        (lambda m: SWA(m, start=6, every=2), 6, 8),
        (lambda m: EMA(m, 0.5, every=2, start=6), 6, 8),
    ],
    ids=["lawa", "swa", "ema"],
)
def test_nothing_before_start(make, first, second):
    """What the model was before `start` has no share."""
    net = Net()
    online = make(net)
    states = {}
    for step, state in walk(net, 9):
        online.update(step)
        states[step] = state
        if step in (first, first + 1):
            ref.assert_close(
                online.average()["wte.weight"].float(), ref.wide(states[first]["wte.weight"])
            )
    want = want_average(states, {first: Fraction(1, 2), second: Fraction(1, 2)})
    ref.assert_close(online.average()["wte.weight"].float(), want["wte.weight"])


@pytest.mark.parametrize(
    "make",
    [
        lambda m: LAWA(m, k=0, spacing=1),
        lambda m: LAWA(m, k=2, spacing=0),
        lambda m: EMA(m, 1.5),
        lambda m: EMA(m, []),
        lambda m: EMA(m, [0.5, math.nan]),
        lambda m: SWA(m, every=0),
    ],
    ids=["k", "spacing", "beta", "no beta", "one bad beta", "every"],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(LawaError):
        make(Net())


# ------------------------------------------------------------------ swapping


@kinds
def test_swapped_in_and_exactly_back(kind):
    net = Net()
    online = BUILDERS[kind][0](net)
    follow(online, net, 13)
    before, objects = (
        ref.state_bits(net.state_dict()),
        {n: (id(p), p.data_ptr()) for n, p in net.named_parameters()},
    )
    idx = torch.tensor([[1, 2, 3]])
    plain = net(idx).detach().clone()
    mean = online.average()
    with online.swapped():
        inside = ref.state_bits(net.state_dict())
        assert inside["wte.weight"] == ref.bits(mean["wte.weight"].float())
        assert inside["wte.weight"] == inside["head.weight"] != before["wte.weight"]
        assert net.head.weight is net.wte.weight
        want = (mean["wte.weight"].float()[idx] @ mean["wte.weight"].float().T) * mean[
            "scale"
        ].float()
        assert torch.allclose(net(idx), want, atol=1e-6)
    assert ref.state_bits(net.state_dict()) == before
    assert {
        n: (id(p), p.data_ptr()) for n, p in net.named_parameters()
    } == objects  # the optimizer's references still hold
    assert ref.bits(net(idx)) == ref.bits(plain)


@kinds
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_swapped_back_after_an_exception(kind, error):
    net = Net()
    with torch.no_grad():
        net.running.copy_(torch.tensor([-0.0, math.nan, math.inf]))
    online = BUILDERS[kind][0](net)
    online.update(4)
    with torch.no_grad():
        net.wte.weight.add_(1)
    before = ref.state_bits(net.state_dict())
    with pytest.raises(error), online.swapped():
        assert ref.state_bits(net.state_dict()) != before
        raise error("in the middle of an evaluation")
    assert ref.state_bits(net.state_dict()) == before


@kinds
def test_what_happens_inside_does_not_change_the_average(kind):
    """An evaluation that writes to the model inside (batch norm in train mode, say) spoils neither
    model nor average."""
    net = Net()
    online = BUILDERS[kind][0](net)
    follow(online, net, 12)
    before, mean = ref.state_bits(net.state_dict()), ref.state_bits(online.average())
    with online.swapped(), torch.no_grad():
        net.wte.weight.zero_()
        net.running.fill_(7)
        net.seen.fill_(7)
    assert ref.state_bits(net.state_dict()) == before
    assert ref.state_bits(online.average()) == mean


def test_training_after_a_swap_is_as_if_it_had_not_been():
    """AdamW on a real loss, with and without an evaluation under the average at every third
    step."""

    def train(swap):
        net = Net()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        online = LAWA(net, k=3, spacing=2)
        rng = torch.Generator().manual_seed(3)
        for step in range(1, 13):
            idx = torch.randint(0, 11, (4, 5), generator=rng)
            loss = nn.functional.cross_entropy(net(idx).flatten(0, 1), idx.roll(-1, 1).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            online.update(step)
            if swap and step % 3 == 0:
                with online.swapped(), torch.no_grad():
                    net(idx)
        return ref.state_bits(net.state_dict()), ref.state_bits(online.average())

    assert train(True) == train(False)


@kinds
def test_asked_before_the_first_update(kind):
    """Either a clear error or the model as it is; never zeros, never a NaN."""
    net = Net()
    before = ref.state_bits(net.state_dict())
    online = BUILDERS[kind][0](net)
    try:
        got = online.average()
    except LawaError as error:
        assert "\n" not in str(error)
    else:
        assert ref.bits(got["wte.weight"].float()) == before["wte.weight"]
    assert ref.state_bits(net.state_dict()) == before


# ------------------------------------------------------------------ stop and resume


@kinds
@pytest.mark.parametrize("cut", [1, 3, 6, 12, 17])
def test_resume_equals_an_uninterrupted_run(kind, cut, tmp_path):
    """State through torch.save and a weights-only load; the window part-full, full, between two
    grid steps."""
    build = BUILDERS[kind][0]
    whole = Net()
    online = build(whole)
    follow(online, whole, 24)
    first = Net()
    before = build(first)
    for step, _ in walk(first, 24):
        before.update(step)
        if step == cut:
            torch.save(
                {"online": before.state_dict(), "model": first.state_dict()}, tmp_path / "resume.pt"
            )
            state = torch.load(tmp_path / "resume.pt", weights_only=True)
            resumed = Net(seed=99)
            resumed.load_state_dict(state["model"])
            after = build(resumed)
            after.load_state_dict(state["online"])
            break
    for step, state in walk(whole_again := Net(), 24):
        if step > cut:
            resumed.load_state_dict(state)
            after.update(step)
    assert (
        ref.state_bits(resumed.state_dict())
        == ref.state_bits(whole.state_dict())
        == ref.state_bits(whole_again.state_dict())
    )
    assert ref.state_bits(after.average()) == ref.state_bits(online.average())


@kinds
def test_a_saved_state_does_not_move_with_the_run(kind):
    """state_dict() is taken, training goes on, then the state is loaded."""
    net = Net()
    online = BUILDERS[kind][0](net)
    steps = walk(net, 20)
    for _ in range(12):
        online.update(next(steps)[0])
    saved, want = online.state_dict(), ref.state_bits(online.average())
    kept = copy.deepcopy(saved)
    for _ in range(8):
        online.update(next(steps)[0])
    assert ref.state_bits(online.average()) != want
    for state in (kept, saved):
        fresh = BUILDERS[kind][0](Net())
        fresh.load_state_dict(state)
        assert ref.state_bits(fresh.average()) == want


@pytest.mark.parametrize("k", [2, 5])
def test_state_of_another_window_width(k):
    """Refused, or from the first full window on the width that was asked for: never more than k
    snapshots."""
    net = Net()
    online = LAWA(net, k=3, spacing=1)
    states = follow(online, net, 6)
    other = LAWA(net, k=k, spacing=1)
    try:
        other.load_state_dict(online.state_dict())
    except LawaError:
        return
    for step, state in walk(net, 16, seed=2):
        if step > 6:
            other.update(step)
            states[step] = state
    want = want_average(states, dict.fromkeys(range(17 - k, 17), Fraction(1, k)))
    ref.assert_close(other.average()["wte.weight"], want["wte.weight"])


def test_state_of_another_kind_or_model_is_refused():
    """When it is loaded, or at the latest when it is used."""
    makers = [lambda m: LAWA(m, k=3, spacing=4), lambda m: EMA(m, 0.9), lambda m: SWA(m)]
    for make in makers:
        net = Net()
        online = make(net)
        follow(online, net, 4)
        state = online.state_dict()
        for other in [make(nn.Linear(4, 4)), *(m(Net()) for m in makers if m is not make)]:
            with pytest.raises(LawaError):
                other.load_state_dict(state)
                other.average()
                with other.swapped():
                    pass


@pytest.mark.parametrize("other", [0.99, (0.99, 0.5)])
def test_state_of_another_beta_is_refused_before_training_goes_on(other):
    net = Net()
    begun = EMA(net, (0.9, 0.5))
    follow(begun, net, 4)
    with pytest.raises(LawaError, match=r"betas .*0\.99.*, got .*0\.9"):
        EMA(net, other).load_state_dict(begun.state_dict())


def test_a_beta_that_is_new_begins_with_the_next_update():
    net = Net()
    begun = EMA(net, 0.9)
    follow(begun, net, 4)
    more = EMA(net, (0.9, 0.5))
    more.load_state_dict(begun.state_dict())
    more.update(100)
    assert torch.equal(more.average(0.5)["wte.weight"], net.state_dict()["wte.weight"])


# ------------------------------------------------------------------ wrapped models


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """One process is a group of its own."""
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "ddp": lambda m: nn.parallel.DistributedDataParallel(m),
    "compile": lambda m: torch.compile(m, backend="eager"),
    "compiled ddp": lambda m: torch.compile(
        nn.parallel.DistributedDataParallel(m), backend="eager"
    ),
    "ddp of compiled": lambda m: nn.parallel.DistributedDataParallel(
        torch.compile(m, backend="eager")
    ),
    "data parallel": lambda m: nn.DataParallel(m),
}


@kinds
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_wrapped_models(wrapper, kind, group, tmp_path):
    """The same names and bits as for the bare model; swapping acts on what the wrapper calls; a
    state moves between them."""
    build = BUILDERS[kind][0]
    bare, inner = Net(), Net()
    model = WRAPPERS[wrapper](inner)
    online, wrapped = build(bare), build(model)
    follow(online, bare, 13)
    follow(wrapped, inner, 13)
    want = ref.state_bits(online.average())
    assert ref.state_bits(wrapped.average()) == want
    idx = torch.tensor([[1, 2]])
    before, plain = ref.state_bits(inner.state_dict()), model(idx).detach().clone()
    with wrapped.swapped():
        with online.swapped():
            assert ref.bits(model(idx)) == ref.bits(bare(idx))
        assert ref.bits(model(idx)) != ref.bits(plain)
    assert ref.state_bits(inner.state_dict()) == before
    moved = build(Net())
    moved.load_state_dict(wrapped.state_dict())
    assert ref.state_bits(moved.average()) == want


def test_a_submodule_called_module_is_no_wrapper():
    """Only the wrappers' own prefix is looked through."""
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.other = nn.Linear(2, 2)
    online = LAWA(model, k=2, spacing=1)
    online.update(1)
    assert set(online.average()) == set(model.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device here")
@kinds
def test_model_on_another_device(kind):
    net, twin = Net().cuda(), Net()
    online, here = BUILDERS[kind][0](net), BUILDERS[kind][0](twin)
    for step, state in walk(twin, 13):
        net.load_state_dict(state)
        online.update(step)
        here.update(step)
    for name, want in here.average().items():
        ref.assert_close(online.average()[name].float(), ref.wide(want), 2)
    before = ref.state_bits(net.state_dict())
    with online.swapped():
        assert net.wte.weight.is_cuda
    assert ref.state_bits(net.state_dict()) == before


def test_a_model_moved_after_the_average_began():
    """.to(dtype) replaces the tensors; the average follows the module, not the old tensors."""
    net = Net()
    online = LAWA(net, k=2, spacing=1)
    online.update(1)
    first = net.wte.weight.detach().clone()
    net.double()
    with torch.no_grad():
        net.wte.weight.add_(2)
    online.update(2)
    got = online.average()["wte.weight"]
    assert torch.allclose(got.double(), first.double() + 1, atol=1e-6)
    with online.swapped():
        assert net.wte.weight.dtype == torch.float64
        assert torch.allclose(net.wte.weight, first.double() + 1, atol=1e-6)
