import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.data import (
    TRANSFORMS,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomFlip,
    open_dataset,
    parse_transforms,
)
from hotloop.data.affine import AffineRange, draw_inverse_maps, warp
from hotloop.data.hashing import mix, uniform
from hotloop.errors import DataError, InputError
from support import examples

RANDOM = [RandomAffine(), RandomAffine(180, 0.5, (0.5, 2.0), 40), RandomCrop(3), RandomFlip()]


def images(count, channels=1, height=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator
    )


def gather(data, positions, **options):
    """Through rows that are apart, as in a pool."""
    count, numel = len(positions), math.prod(data.sample_shape)
    x = torch.empty(count, numel + 3)[:, :numel].unflatten(1, data.sample_shape)
    y = torch.empty(count, dtype=torch.int64)
    data.gather(torch.as_tensor(positions), x, y, training=True, **options)
    return x.contiguous()


@settings(max_examples=examples(60), deadline=None)
@given(
    transforms=st.lists(st.sampled_from([*RANDOM, Normalize(0.3, 0.7)]), max_size=3),
    order=st.permutations(range(24)),
    cuts=st.sets(st.integers(1, 23), max_size=5),
    channels=st.integers(1, 3),
    width=st.integers(1, 37),
    as_float=st.booleans(),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**64),
)
def test_a_sample_does_not_depend_on_its_batch_bit_for_bit(
    transforms, order, cuts, channels, width, as_float, epoch, seed
):
    pixels = images(24, channels, 6, width)
    if as_float:
        pixels = pixels.float() / 255
    data = open_dataset((pixels, torch.arange(24)), transforms=transforms, seed=seed)
    whole = gather(data, list(range(24)), epoch=epoch)
    edges = [0, *sorted(cuts), 24]
    for start, end in pairwise(edges):
        part = order[start:end]
        assert torch.equal(gather(data, part, epoch=epoch), whole[part])


@pytest.mark.parametrize("transform", RANDOM, ids=lambda t: t.name)
def test_draws_change_with_epoch_seed_and_place_in_the_chain(transform):
    pixels = images(32)
    data = open_dataset((pixels, torch.arange(32)), transforms=[transform], seed=1)
    first = gather(data, list(range(32)), epoch=0)
    assert not torch.equal(first, gather(data, list(range(32)), epoch=1))
    other = open_dataset(data, transforms=[transform], seed=2)
    assert not torch.equal(first, gather(other, list(range(32)), epoch=0))
    evaluation = torch.empty(32, 1, 7, 5)
    data.gather(torch.arange(32), evaluation, torch.empty(32, dtype=torch.int64), training=False)
    assert torch.equal(evaluation, pixels.float() / 255)


@settings(deadline=None)
@given(
    keys=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    start=st.integers(0, 2**62),
)
def test_uniform_is_uniform_and_independent(keys, start):
    positions = torch.arange(start, start + 4000)
    a = uniform(keys[0], positions, 2)
    assert a.shape == (4000, 2)
    assert a.min() >= 0
    assert a.max() < 1
    # Five standard errors of mean, variance and correlation.
    assert (a.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 4000)
    assert (a.var(0) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 4000)
    streams = [a[:, 0], a[:, 1]] + (
        [] if keys[0] == keys[1] else [uniform(keys[1], positions, 1)[:, 0]]
    )
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 6 / math.sqrt(4000)


def test_uniform_follows_splitmix64():
    """Against the published generator, in Python's own integers."""
    mask = (1 << 64) - 1

    def output(state):
        z = state & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    # First output of the generator from state 0, as in its reference implementation's tests.
    assert output(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    positions = [0, 1, 17, 2**40, 2**63 - 1]
    drawn = uniform(99, torch.tensor(positions), 3)
    for row, position in enumerate(positions):
        for draw in range(3):
            state = position * 0x9E3779B97F4A7C15 + mix(99, draw)
            assert drawn[row, draw].item() == (output(state) >> 11) * 2.0**-53


def test_drawn_angles_are_within_range_and_spread():
    maps = draw_inverse_maps(AffineRange(30, 0, (1, 1), 0), 5, torch.arange(2000), 9, 9)
    angles = torch.rad2deg(torch.atan2(maps[:, 0, 1], maps[:, 0, 0]))
    assert -30 <= angles.min() < -29
    assert 29 < angles.max() <= 30
    assert angles.mean().abs() < 2
    # A rotation: orthogonal, determinant 1, no shift.
    linear = maps[:, :, :2].double()
    assert torch.allclose(linear @ linear.mT, torch.eye(2).double(), atol=1e-6)
    assert maps[:, :, 2].abs().max() == 0


def test_maps_are_the_inverse_of_scale_rotation_shear_and_shift():
    ranges = AffineRange(180, 0.3, (0.5, 2.0), 40)
    positions = torch.arange(500)
    maps = draw_inverse_maps(ranges, 11, positions, 10, 20).double()
    drawn = uniform(11, positions, 5).numpy()
    for row in range(0, 500, 50):
        turn, lean = (
            np.radians((2 * drawn[row, 0] - 1) * 180),
            np.radians((2 * drawn[row, 1] - 1) * 40),
        )
        scale = 0.5 + 1.5 * drawn[row, 2]
        shift = np.array([(2 * drawn[row, 3] - 1) * 6, (2 * drawn[row, 4] - 1) * 3])
        rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        inverse = np.linalg.inv(scale * rotate @ np.array([[1, np.tan(lean)], [0, 1]]))
        wanted = np.column_stack([inverse, -inverse @ shift])
        np.testing.assert_allclose(maps[row].numpy(), wanted, atol=1e-5)


def test_warp_moves_pixels_where_the_map_says():
    picture = images(1, 2, 5, 8).float()
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    assert torch.allclose(warp(picture, identity), picture, atol=1e-3)
    from_right = torch.tensor([[[1.0, 0, 2], [0, 1, 0]]])
    moved = warp(picture, from_right)
    assert torch.allclose(moved[..., :6], picture[..., 2:], atol=1e-3)
    assert (moved[..., 6:].abs() < 1e-3).all()
    square = images(1, 1, 6, 6).float()
    quarter = torch.tensor([[[0.0, 1, 0], [-1, 0, 0]]])
    # The output's top row looks down the input's left column: a quarter turn clockwise.
    assert torch.allclose(warp(square, quarter), square.rot90(-1, (2, 3)), atol=1e-3)


def test_crop_shifts_by_whole_pixels_and_uses_every_shift():
    pixels = images(400, 2, 6, 4)
    data = open_dataset((pixels, torch.arange(400)), transforms=[RandomCrop(1)])
    out = gather(data, list(range(400)))
    seen = set()
    padded = torch.nn.functional.pad(pixels.float() / 255, (1, 1, 1, 1))
    for row in range(400):
        for dy in range(3):
            for dx in range(3):
                if torch.equal(out[row], padded[row, :, dy : dy + 6, dx : dx + 4]):
                    seen.add((dy, dx))
                    break
            else:
                continue
            break
        else:
            pytest.fail(f"sample {row} is no shift of its image")
    assert len(seen) == 9


def test_flip_mirrors_its_share():
    pixels = images(1000, 3)
    data = open_dataset((pixels, torch.arange(1000)), transforms=[RandomFlip(0.25)])
    out = gather(data, list(range(1000)))
    plain = pixels.float() / 255
    flipped = [torch.equal(o, p.flip(-1)) for o, p in zip(out, plain, strict=True)]
    kept = [torch.equal(o, p) for o, p in zip(out, plain, strict=True)]
    assert all(a or b for a, b in zip(flipped, kept, strict=True))
    assert 180 < sum(flipped) < 320


def test_normalize_by_channel_and_anywhere_in_the_chain():
    pixels = images(4, 3)
    by_channel = Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    wanted = pixels.double() / 255
    wanted = (wanted - torch.tensor([0.1, 0.2, 0.3]).double()[:, None, None]) / torch.tensor(
        [0.5, 0.6, 0.7]
    ).double()[:, None, None]
    for chain in ([by_channel], [RandomFlip(0.0), by_channel]):
        data = open_dataset((pixels, torch.arange(4)), transforms=chain)
        assert (gather(data, [0, 1, 2, 3]).double() - wanted).abs().max() < 1e-6


def test_names_are_parsed_and_mistakes_named():
    assert parse_transforms("") == ()
    assert parse_transforms("normalize(0.1307, 0.3081)") == (Normalize(0.1307, 0.3081),)
    assert parse_transforms(" affine , crop(4),flip(0.25),normalize(0,1)") == (
        RandomAffine(),
        RandomCrop(4),
        RandomFlip(0.25),
        Normalize(0, 1),
    )
    assert parse_transforms("affine(5,0.1)")[0] == RandomAffine(5, 0.1)
    assert set(TRANSFORMS) == {"normalize", "affine", "crop", "flip"}
    wrong = [
        "blur", "normalize", "normalize(1)", "affine(1,2,3,4,5,6)", "flip(x)", "crop(1", "flip(2)",
        "normalize(0,0)", "crop(1.5)", "affine(1,0.1,2)", "flip;crop",
    ]  # fmt: skip
    for text in wrong:
        with pytest.raises(InputError) as error:
            parse_transforms(text)
        assert "\n" not in str(error.value)


def test_values_and_shapes_that_do_not_fit_are_refused():
    for make in (
        lambda: Normalize((1.0, 2.0), 1.0),
        lambda: Normalize((), ()),
        lambda: Normalize(math.nan, 1.0),
        lambda: RandomAffine(degrees=-1),
        lambda: RandomAffine(scale=(2.0, 1.0)),
        lambda: RandomAffine(shear=90),
        lambda: RandomCrop(-1),
    ):
        with pytest.raises(InputError):
            make()
    vectors = (torch.zeros(3, 9), torch.arange(3))
    for transform in RANDOM:
        with pytest.raises(DataError, match="images"):
            open_dataset(vectors, transforms=[transform])
    with pytest.raises(DataError, match="2 channels"):
        open_dataset(vectors, transforms=[Normalize((0.0, 0.0), (1.0, 1.0))])
    with pytest.raises(DataError, match="real-valued"):
        open_dataset((torch.zeros(3, 9).long(), torch.arange(3)), transforms=[Normalize(0.0, 1.0)])
