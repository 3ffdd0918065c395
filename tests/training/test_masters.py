"""fp32 masters under bf16 compute, and the grid dither that lets small updates be seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from selm_fast.model import Policy
from selm_fast.training.digest import weights_digest
from selm_fast.training.dither import _CHUNK, dither_
from selm_fast.training.masters import Masters

from .harness import Live, MakeConfig, make_rows, run, same_bits

ROWS = make_rows(8, seed=41)


def every_bf16() -> Tensor:
    """All 65,536 numbers that bf16 has, as fp32."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def gaps(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of positive normal bf16 numbers to their neighbours below and above."""
    bits = grid.bfloat16().view(torch.int16)
    below, above = ((bits + step).view(torch.bfloat16).double() for step in (-1, 1))
    return grid.double() - below, above - grid.double()


@pytest.mark.parametrize("seed", range(8))
def test_dither_leaves_every_bf16_copy_as_it_was(seed: int) -> None:
    grid = every_bf16()
    moved = grid.clone()
    dither_(moved, seed=seed, name="w")
    there = ~grid.isnan()
    assert same_bits(moved[there].bfloat16(), grid[there].bfloat16())
    assert moved.isnan().equal(grid.isnan())
    still = (grid == 0) | ~grid.isfinite() | (grid.abs() < 2.0**-124)
    assert same_bits(moved[still], grid[still])
    assert (moved[~still] != grid[~still]).double().mean() > 0.999
    assert (moved.sign() == grid.sign())[there].all()


def test_dither_fills_the_cell_and_nothing_else() -> None:
    """Offsets reach from half the gap below to half the gap above, at powers of two as well, where the gaps differ."""
    for value in (1.0, 0.02, 1.0 + 2**-7, 2.0**-30, 255.0):
        grid = torch.full((20_000,), value).bfloat16().float()
        moved = grid.clone()
        dither_(moved, seed=1, name="w")
        offset = moved.double() - grid.double()
        below, above = (gap[0].item() for gap in gaps(grid[:1]))
        assert -below / 2 < offset.min() < -0.99 * below / 2
        assert 0.99 * above / 2 < offset.max() < above / 2
        if below == above:
            assert offset.mean().abs() < 0.02 * above
        quarters = torch.histc((offset / torch.where(offset < 0, below, above)).float(), bins=4, min=-0.5, max=0.5)
        assert (quarters / len(grid) - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_small_updates_are_seen_in_the_mean(share: float, sign: int) -> None:
    """An update of a small share of the gap moves that share of the copies by a gap; without the dither, none."""
    generator = torch.Generator().manual_seed(0)
    grid = (1 + torch.rand(200_000, generator=generator)).mul_(0.01).bfloat16().float()
    _, gap = gaps(grid)
    update = (sign * share * gap).float()
    moved = grid.clone()
    dither_(moved, seed=3, name="w")
    seen = ((moved + update).bfloat16().double() - grid.double()) / gap
    assert seen.mean().item() == pytest.approx(sign * share, rel=0.05, abs=0.003)
    if share < 0.5:
        lost = (grid + update).bfloat16().double() - grid.double()
        assert (lost == 0).double().mean() > 0.98  # but at powers of two, whose lower gap is smaller


def test_dither_depends_on_seed_name_and_position_alone() -> None:
    base = torch.full((5000,), 0.75)

    def dithered(seed: int = 0, name: str = "w", values: Tensor = base) -> Tensor:
        moved = values.clone()
        dither_(moved, seed=seed, name=name)
        return moved

    assert same_bits(dithered(), dithered())
    for other in (dithered(seed=1), dithered(name="v")):
        assert (other != dithered()).double().mean() > 0.99
    assert len(dithered().unique()) > 4000  # positions differ
    reshaped = dithered(values=base.view(50, 100))
    assert same_bits(reshaped.view(-1), dithered())
    elsewhere = base.clone()
    elsewhere[::2] = 1.5
    assert same_bits(dithered(values=elsewhere)[1::2], dithered()[1::2])  # whatever the neighbours are


def test_dither_of_long_tensors_does_not_repeat_itself() -> None:
    moved = torch.full((_CHUNK + 1000,), 0.75)
    dither_(moved, seed=0, name="w")
    short = torch.full((1000,), 0.75)
    dither_(short, seed=0, name="w")
    assert same_bits(moved[:1000], short)
    assert (moved[_CHUNK:] != short).double().mean() > 0.99


def test_elements_off_the_grid_stay() -> None:
    values = torch.tensor([0.1, 1 / 3, math.pi, -1e-3, 1 + 2**-9])
    moved = values.clone()
    dither_(moved, seed=0, name="w")
    assert same_bits(values, moved)
    twice = torch.full((1000,), 0.75)
    dither_(twice, seed=0, name="w")
    once = twice.clone()
    dither_(twice, seed=1, name="w")
    assert (twice == once).double().mean() > 0.999


@pytest.mark.parametrize(
    "bad", [torch.ones(4, dtype=torch.bfloat16), torch.ones(4, 4).t()[1:]], ids=["dtype", "strides"]
)
def test_dither_refuses_what_it_would_get_wrong(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous fp32"):
        dither_(bad, seed=0, name="w")


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model


def test_in_fp32_the_parameters_are_the_masters() -> None:
    model = small_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masters = Masters(model, torch.float32)
    for name, weight in model.named_parameters():
        assert masters.masters[name] is weight
        assert same_bits(weight, before[name])


@pytest.mark.parametrize("seed", [None, 5])
def test_in_bf16_copies_compute_and_masters_keep_their_digits(seed: int | None) -> None:
    model = small_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masters = Masters(model, torch.bfloat16, dither_seed=seed)
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert masters.masters[name].dtype == torch.float32
        assert same_bits(weight.float(), before[name])
        assert same_bits(masters.masters[name].bfloat16(), weight)
        assert masters.masters[name].equal(before[name]) == (seed is None)
    with torch.no_grad():
        for master in masters.masters.values():
            master += 0.3
    masters.publish()
    for name, weight in model.named_parameters():
        assert same_bits(weight, masters.masters[name].bfloat16())
    state = {name: master.detach() - 1 for name, master in masters.masters.items()}
    with torch.no_grad():
        for name, master in masters.masters.items():
            master.copy_(state[name])
    masters.publish()
    for name, weight in model.named_parameters():
        assert same_bits(masters.masters[name], state[name])
        assert same_bits(weight, state[name].bfloat16())


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bf16: adding up in the copies' dtype would lose every small micro-batch."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    masters = Masters(model, torch.bfloat16)
    for size in [256.0] + [1.0] * 10:
        model(torch.tensor([[size]], dtype=torch.bfloat16)).sum().backward()
        assert model.weight.grad is None
    grad = masters.masters["weight"].grad
    assert grad is not None
    assert grad.dtype == torch.float32
    assert grad.item() == 266.0


def test_tied_weights_have_one_master_and_both_gradients(tied_model: object) -> None:
    policy = Policy.from_pretrained(str(tied_model))
    masters = Masters(policy.model, torch.bfloat16, dither_seed=0)
    embedding = policy.model.get_input_embeddings().weight
    assert policy.head.weight is embedding
    names = [name for name, weight in masters.parameters.items() if weight is embedding]
    assert len(names) == 1
    (embedding.sum() + 2 * policy.head.weight.sum()).backward()
    grad = masters.masters[names[0]].grad
    assert grad is not None
    assert (grad == 3.0).all()


def digest_of(model: nn.Module, compute: torch.dtype = torch.float32) -> str:
    return weights_digest(dict(model.named_parameters()), compute)


def test_weights_digest_sees_every_bit() -> None:
    digests = {digest_of(small_model())}
    changed = small_model()
    with torch.no_grad():
        changed[1].bias.view(torch.int32)[2] ^= 1
    digests.add(digest_of(changed))
    digests.add(digest_of(small_model(), torch.bfloat16))
    renamed = nn.Sequential()
    renamed.add_module("first", small_model()[0])
    renamed.add_module("second", small_model()[1])
    digests.add(digest_of(renamed))
    assert len(digests) == 4
    assert digest_of(small_model()) in digests


def test_weights_digest_sees_the_places_of_elements() -> None:
    """It is a sum over elements, but two that change places change it, within a weight or between two."""
    model = small_model()
    expected = digest_of(model)
    with torch.no_grad():
        weight = model[0].weight
        weight[[0, 1]] = weight[[1, 0]]
        assert digest_of(model) != expected
        weight[[0, 1]] = weight[[1, 0]]
        assert digest_of(model) == expected
        model[0].bias[0], model[1].bias[0] = model[1].bias[0].clone(), model[0].bias[0].clone()
    assert digest_of(model) != expected


@pytest.mark.parametrize("dither", [None, True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dither_is_on_where_compute_is_bf16(
    make_config: MakeConfig, live: Live, bf16_model: object, dither: bool | None, dtype: str
) -> None:
    config = make_config(dtype=dtype, grid_dither=dither, model__path=str(bf16_model), optim__lr=1e-30)
    run(config, ROWS)
    assert live.trainer is not None
    masters = live.trainer.masters.masters
    on = dither if dither is not None else dtype == "bfloat16"
    large = [master for master in masters.values() if master.dim() > 1]
    for master in large:
        on_the_grid = (master == master.bfloat16().float()).double().mean()
        assert on_the_grid < 0.01 if on else on_the_grid == 1.0


def test_small_learning_rates_move_the_bf16_weights(make_config: MakeConfig, live: Live, bf16_model: object) -> None:
    """Without the dither nearly every update is rounded away; with it the copies follow the masters in the mean."""
    seen = {}
    for dither in (True, False):
        config = make_config(
            f"dither-{dither}", dtype="bfloat16", grid_dither=dither, model__path=str(bf16_model), optim__lr=2e-6,
            optim__schedule="constant", epochs=4,
        )  # fmt: skip
        start = {
            name: weight.double() for name, weight in Policy.from_pretrained(str(bf16_model)).model.named_parameters()
        }
        run(config, ROWS)
        assert live.trainer is not None
        policy, masters = live.trainer.policy, live.trainer.masters.masters
        dithered = Masters(
            Policy.from_pretrained(str(bf16_model)).model, torch.bfloat16, dither_seed=42 if dither else None
        )
        along = total = 0.0
        for name, weight in policy.model.named_parameters():
            movement = masters[name].double() - dithered.masters[name].double()
            along += ((weight.double() - start[name]) * movement.sign()).sum().item()
            total += movement.abs().sum().item()
        assert total > 0
        seen[dither] = along / total
    assert seen[True] == pytest.approx(1.0, abs=0.5)
    assert seen[False] < 0.5 * seen[True]
