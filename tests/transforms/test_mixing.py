"""Mixup, CutMix and the plan of partners: drawn by keys alone, within a split and a block, exact in whole numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.stats import beta

from kdpipe.data.columns import Ragged, take
from kdpipe.errors import ConfigError
from kdpipe.transforms import Compose, CutMix, Erasing, Flip, Mixup, PadAndCrop
from kdpipe.views import PARTNER_BLOCK, Pairs, PartnerPlan, ViewSpec, partner_blocks, row_keys, taken
from projects import REPOSITORY

NUM_ROWS = 1000
IDS = np.array([f"id-{row}" for row in range(NUM_ROWS)])
SPLITS = np.where(np.arange(NUM_ROWS) % 3 == 0, "validation", "train")
SHAPE = (12, 14, 3)
EVERY = np.arange(NUM_ROWS)


def images():
    return {"image": np.random.default_rng(0).integers(0, 256, (NUM_ROWS, *SHAPE)).astype(np.uint8)}


def spec(transform, seed=3, splits=SPLITS):
    return ViewSpec(count=2, seed=seed, transform=transform, partners=PartnerPlan(IDS, splits))


def shown(transform, columns, rows=EVERY, view=1, **settings):
    return spec(transform, **settings).read(lambda some: taken(columns, some), IDS, rows, view)


def test_partners_are_of_the_same_split_and_block_and_every_row_is_one_once():
    partners = PartnerPlan(IDS, SPLITS).of(EVERY, view=1, seed=3)
    assert np.array_equal(SPLITS[partners], SPLITS)
    assert np.array_equal(partners // PARTNER_BLOCK, EVERY // PARTNER_BLOCK)
    assert np.array_equal(np.sort(partners), EVERY)
    assert (partners == EVERY).sum() == 0
    for other in ({"view": 2, "seed": 3}, {"view": 1, "seed": 4}):
        assert (PartnerPlan(IDS, SPLITS).of(EVERY, **other) == partners).mean() < 0.05


def test_partners_depend_on_their_block_alone():
    plan, some = PartnerPlan(IDS, SPLITS), np.random.default_rng(0).permutation(NUM_ROWS)[:77]
    partners = plan.of(EVERY, 1, 3)
    assert np.array_equal(plan.of(some, 1, 3), partners[some])
    assert len(plan.of(some[:0], 1, 3)) == 0
    moved = SPLITS.copy()
    moved[300] = "test"
    changed = np.flatnonzero(PartnerPlan(IDS, moved).of(EVERY, 1, 3) != partners)
    assert set(changed // PARTNER_BLOCK) == {1}
    assert partner_blocks(300, 301, NUM_ROWS) == slice(256, 512)
    assert partner_blocks(900, 1000, NUM_ROWS) == slice(768, 1000)
    assert np.array_equal(PartnerPlan(IDS[:768], SPLITS[:768]).of(EVERY[:768], 1, 3), partners[:768])


def test_many_blocks_are_drawn_anew():
    ids = np.array([str(row) for row in range(PARTNER_BLOCK * 1100)])
    plan = PartnerPlan(ids, np.full(len(ids), ""))
    rows = np.arange(0, len(ids), PARTNER_BLOCK)
    first = plan.of(rows[:3], 1, 0)
    plan.of(rows, 1, 0)
    assert np.array_equal(plan.of(rows[:3], 1, 0), first)


def test_a_row_alone_is_mixed_with_itself():
    splits = SPLITS.copy()
    splits[[5, 700]] = "alone", "other"
    for transform, columns in ((Mixup(), images()), (CutMix(), images()), (Mixup(alpha=1), table())):
        found = shown(transform, columns, splits=splits)
        assert found.partners[[5, 700]].tolist() == [5, 700]
        assert (found.share[[5, 700]] < 1).any()
        for name, column in columns.items():
            part = take(column, np.array([5, 700])), take(found.columns[name], np.array([5, 700]))
            assert rows_of(part[0]) == rows_of(part[1])


def test_mixup_is_the_mean_in_its_shares_rounded_once():
    columns = images()
    found = shown(Mixup(alpha=1), columns)
    own = found.share[:, None, None, None]
    exact = own * columns["image"] + (1 - own) * columns["image"][found.partners]
    assert np.abs(found.columns["image"] - exact).max() <= 0.5
    assert ((found.share * 65536) % 1 == 0).all()


def test_cutmix_takes_one_box_and_its_share_is_what_stays():
    columns = images()
    found = shown(CutMix(), columns)
    image, partner, mixed = columns["image"], columns["image"][found.partners], found.columns["image"]
    differs = (mixed != image).any(axis=3)
    assert (mixed[differs] == partner[differs]).all()
    for row in range(50):
        lines, places = np.flatnonzero(differs[row].any(axis=1)), np.flatnonzero(differs[row].any(axis=0))
        area = 0 if not len(lines) else (lines[-1] - lines[0] + 1) * (places[-1] - places[0] + 1)
        assert found.share[row] == pytest.approx(1 - area / (SHAPE[0] * SHAPE[1]))
    assert 0.6 < found.share.mean() < 0.8


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_are_of_the_beta_distribution(alpha):
    keys = row_keys([str(row) for row in range(4000)], 1)
    pairs = Pairs(rows=np.arange(4000), partners=np.arange(4000))
    _, share = Mixup(alpha=alpha).mix({"features": np.zeros((4000, 1), np.float32)}, keys, 1, pairs)
    points = np.linspace(0.01, 0.99, 25)
    assert np.abs((share[:, None] <= points).mean(axis=0) - beta(alpha, alpha).cdf(points)).max() < 0.03


@pytest.mark.parametrize("transform", [Mixup(probability=0.25, alpha=1), CutMix(probability=0.25)])
def test_most_rows_may_stay(transform):
    columns = images()
    found = shown(transform, columns)
    same = (found.columns["image"] == columns["image"]).all(axis=(1, 2, 3))
    assert same[found.share == 1].all()
    assert 0.7 < (found.share == 1).mean() < 0.8


@pytest.mark.parametrize(
    "transform",
    [
        Mixup(),
        CutMix(),
        Compose([Flip(), PadAndCrop(padding=2), Mixup(alpha=1), Erasing()]),
        Compose([{"factory": "kdpipe.transforms:CutMix", "alpha": 2}, Flip()]),
    ],
)
def test_a_row_does_not_depend_on_its_batch(transform):
    columns = images()
    whole = shown(transform, columns)
    some = np.random.default_rng(1).permutation(NUM_ROWS)[:33]
    part = shown(transform, columns, some)
    assert np.array_equal(part.columns["image"], whole.columns["image"][some])
    assert np.array_equal(part.share, whole.share[some])
    assert np.array_equal(part.partners, whole.partners[some])
    spec(transform).probe(columns, IDS.tolist())
    assert np.array_equal(shown(transform, columns, view=0).columns["image"], columns["image"])


def test_what_stands_before_the_mix_changes_both_and_what_stands_after_it_the_result():
    columns = images()
    both, after = Compose([Flip(probability=1), Mixup(alpha=1)]), Compose([Flip(probability=0), Mixup(alpha=1)])
    plain = shown(after, columns).columns["image"]
    assert np.array_equal(shown(both, columns).columns["image"], plain[:, :, ::-1])
    erased = shown(Compose([Flip(probability=0), Mixup(alpha=1), Erasing(probability=1)]), columns).columns["image"]
    changed = (erased != plain).any(axis=3)
    assert (erased[changed] == 0).all()


def table():
    random = np.random.default_rng(0)
    features = random.normal(size=(NUM_ROWS, 4)).astype(np.float32)
    features[::7, 2] = np.nan
    words = [b"red", b"green", b""]
    rows = [np.frombuffer(words[row % 3], np.uint8) for row in range(NUM_ROWS)]
    offsets = np.cumsum([0, *map(len, rows)])
    return {"features": features, "category.colour": Ragged(values=np.concatenate(rows), offsets=offsets)}


def rows_of(column):
    return [(column.row(row) if isinstance(column, Ragged) else column[row]).tobytes() for row in range(len(column))]


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_a_row_that_is_not_mixed_keeps_its_numbers(probability):
    columns = table()
    found = shown(Mixup(probability=probability), columns)
    itself = found.share == 1
    assert itself.sum() >= 0.3 * NUM_ROWS
    np.testing.assert_array_equal(found.columns["features"][itself], columns["features"][itself])
    missing, own = np.isnan(columns["features"]), found.share[:, None]
    expected = (missing & (own > 0)) | (missing[found.partners] & (own < 1))
    assert np.array_equal(np.isnan(found.columns["features"]), expected)


def test_a_tables_numbers_are_mixed_and_its_categories_are_of_the_larger_share():
    columns = table()
    found = shown(Mixup(alpha=1), columns)
    own = found.share[:, None]
    features = columns["features"].astype(np.float64)
    np.testing.assert_allclose(
        found.columns["features"], own * features + (1 - own) * features[found.partners], rtol=1e-6, atol=1e-6
    )
    before, after = rows_of(columns["category.colour"]), rows_of(found.columns["category.colour"])
    from_row = np.where(found.share >= 0.5, EVERY, found.partners)
    assert after == [before[row] for row in from_row]
    spec(Mixup()).probe(columns, IDS.tolist())


@pytest.mark.parametrize(
    ("transform", "columns", "message"),
    [
        (Mixup(), {"text": Ragged(values=np.zeros(2, np.uint8), offsets=np.arange(3))}, "'text' cannot be mixed"),
        (Mixup(), {"tokens": np.zeros((2, 5), np.int64)}, "'tokens' cannot be mixed; .* words, tokens"),
        (
            Mixup(),
            {"image": np.zeros((2, 4, 4, 1), np.uint8), "text": np.zeros((2, 5), np.uint8)},
            "'image' cannot be mixed; Mixup is for rows of image alone",
        ),
        (CutMix(), {"features": np.zeros((2, 3), np.float32)}, "rows have features; CutMix is for rows of image alone"),
        (CutMix(), {"image": np.zeros((2, 4, 4, 1), np.float32)}, "no column 'image' of uint8 pixels"),
    ],
)
def test_rows_that_cannot_be_mixed_are_refused(transform, columns, message):
    name = type(transform).__name__
    with pytest.raises(ConfigError, match=rf"^views\.transform: {name} fails on .*{message}"):
        ViewSpec(count=1, transform=transform).probe(columns, ["a", "b"])


def test_wrong_arguments_are_refused():
    for arguments, message in (({"alpha": 0}, "alpha is 0"), ({"probability": 2}, "probability is 2")):
        for transform in (Mixup, CutMix):
            with pytest.raises(ConfigError, match=f"{transform.__name__}: {message}"):
                transform(**arguments)
    with pytest.raises(ConfigError, match="Mixup, CutMix all mix rows; a row has one partner"):
        Compose([Mixup(), Flip(), CutMix()])
    with pytest.raises(ConfigError, match=r"give ViewSpec\(partners=PartnerPlan"):
        ViewSpec(count=1, transform=Mixup()).read(lambda rows: images(), IDS, EVERY, 1)
    for transform in (Mixup(), Compose([Mixup()])):
        with pytest.raises(ConfigError, match=r"(Mixup|Compose) mixes rows; use ViewSpec\.read"):
            ViewSpec(count=1, transform=transform).of(images(), IDS.tolist(), 1)


class Own:
    """A user's mixing transform, with what it does wrong."""

    mixes = True

    def __init__(self, share, half=False):
        self._share, self._half = share, half

    def mix(self, columns, keys, seed, pairs):
        rows, partners = pairs.of(columns)
        image = rows["image"] // 2 + partners["image"] // 2
        return {"image": image[: len(image) // 2] if self._half else image}, self._share(pairs.rows)


def test_the_guides_own_transform_mixes():
    guide = (REPOSITORY / "docs" / "guides" / "views.md").read_text()
    names = {}
    exec(re.search(r"```python\n# halves\.py\n(.*?)```", guide, re.DOTALL)[1], names)
    columns, halves = images(), names["Halves"]()
    spec(halves).probe(columns, IDS.tolist())
    found = shown(Compose([Flip(probability=0), halves]), columns)
    middle = SHAPE[1] // 2
    assert np.array_equal(found.columns["image"][:, :, :middle], columns["image"][:, :, :middle])
    assert np.array_equal(found.columns["image"][:, :, middle:], columns["image"][found.partners][:, :, middle:])
    assert (found.share == 0.5).all()


def test_a_transform_of_ones_own_may_mix():
    columns = images()
    halves = Own(lambda rows: np.full(len(rows), 0.5))
    found = shown(Compose([Flip(), halves]), columns)
    assert (found.share == 0.5).all()
    spec(halves).probe(columns, IDS.tolist())
    for own, message in (
        (Own(lambda rows: np.full(len(rows), 1.5)), "Own fails on image .*the shares are"),
        (Own(lambda rows: np.ones(3)), "the shares are .* expected 1000 numbers"),
        (Own(lambda rows: np.ones(len(rows)), half=True), r"Own gives image uint8 \[500, .*expected the layout"),
    ):
        with pytest.raises(ConfigError, match=message):
            shown(own, columns)
    first = Own(lambda rows: np.linspace(0, 1, len(rows)))
    with pytest.raises(ConfigError, match="Own makes another 'share' of the same 16 rows"):
        spec(first).probe(columns, IDS.tolist())
