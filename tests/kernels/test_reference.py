"""The oracle against nested Python loops that transcribe docs/math.md, and against closed forms."""

import math

import pytest
import torch
from numerics import clip_like

from dreamlip_kernels import reference


def unit(v):
    return v / v.norm()


def lse(values):
    values = [float(v) for v in values]
    if not values:
        return -math.inf
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def random_case(n=5, k=3, p=6, d=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    mask = torch.rand(n, k, generator=gen) > 0.3
    mask[0], mask[1] = False, True
    return make(n, d), make(n, k, d), make(n, p, d), mask


def test_bidirectional_logsumexp_against_loops():
    x, text, _, mask = random_case()
    y, y_mask = text.transpose(0, 1), mask.T
    x_mask = torch.tensor([True, False, True, True, True])
    row, col = reference.bidirectional_logsumexp(x, y, 1.7, x_mask=x_mask, y_mask=y_mask)
    for k in range(3):
        for i in range(5):
            expected = lse([1.7 * x[i] @ y[k, j] for j in range(5) if y_mask[k, j] and x_mask[i]])
            assert row[k, i].item() == pytest.approx(expected, abs=1e-12)
        for j in range(5):
            expected = lse([1.7 * x[i] @ y[k, j] for i in range(5) if y_mask[k, j] and x_mask[i]])
            assert col[k, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("negatives, positives", [("slot", "mean"), ("all", "mean"), ("all", "logsum")])
@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_loss_against_loops(negatives, positives, masked):
    image, text, _, mask = random_case()
    n, k = mask.shape
    mask = mask if masked else torch.ones_like(mask)
    s = 2.3
    z = [[[float(s * image[i] @ text[j, c]) for c in range(k)] for j in range(n)] for i in range(n)]
    row_terms, col_terms = [], []
    for i in range(n):
        valid = [c for c in range(k) if mask[i, c]]
        everything = [z[i][j][c] for j in range(n) for c in range(k) if mask[j, c]]
        if positives == "logsum" and valid:
            row_terms.append(lse(everything) - lse([z[i][i][c] for c in valid]))
        for c in valid:
            if positives == "mean":
                candidates = everything if negatives == "all" else [z[i][j][c] for j in range(n) if mask[j, c]]
                row_terms.append(lse(candidates) - z[i][i][c])
            col_terms.append(lse([z[j][i][c] for j in range(n)]) - z[i][i][c])
    expected = sum(row_terms) / len(row_terms) / 2 + sum(col_terms) / len(col_terms) / 2
    got = reference.multi_positive_contrastive_loss(
        image, text, s, text_mask=mask if masked else None, negatives=negatives, positives=positives
    )
    assert got.item() == pytest.approx(expected, abs=1e-12)


IDS = torch.tensor([7, 3, 7, 3, 7])


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("same_image", ["ignore", "positive"])
@pytest.mark.parametrize("negatives", ["slot", "all"])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_targets_against_loops(negatives, masked, same_image, smoothing):
    """Each softmax against its target distribution, eq. 21-22."""
    image, text, _, mask = random_case()
    n, k = mask.shape
    mask = mask if masked else torch.ones_like(mask)
    s = 2.3
    z = lambda i, j, c: float(s * image[i] @ text[j, c])  # noqa: E731
    same = lambda i, j: bool(IDS[i] == IDS[j])  # noqa: E731
    stays = lambda i, j: same_image == "positive" or i == j or not same(i, j)  # noqa: E731

    def cross_entropy(candidates, positives):
        target = (1 - smoothing) * mean([z(*p) for p in positives]) + smoothing * mean([z(*p) for p in candidates])
        return lse([z(*p) for p in candidates]) - target

    terms = []
    for i in range(n):
        for c in range(k):
            if not mask[i, c]:
                continue
            slots = range(k) if negatives == "all" else [c]
            of_row = [(i, j, m) for j in range(n) for m in slots if mask[j, m] and stays(i, j)]
            of_col = [(j, i, c) for j in range(n) if stays(i, j)]
            positive = same_image == "positive"
            row_own = [p for p in of_row if same(i, p[1])] if positive else [(i, i, c)]
            col_own = [p for p in of_col if same(p[0], i)] if positive else [(i, i, c)]
            terms += [cross_entropy(of_row, row_own), cross_entropy(of_col, col_own)]
    got = reference.multi_positive_contrastive_loss(
        image,
        text,
        s,
        text_mask=mask if masked else None,
        negatives=negatives,
        image_ids=IDS,
        same_image=same_image,
        label_smoothing=smoothing,
    )
    assert got.item() == pytest.approx(mean(terms), abs=1e-12)


def test_smoothed_labels_are_those_of_cross_entropy():
    image, text, _, _ = random_case()
    labels = torch.arange(len(image))
    for k in range(text.shape[1]):
        z = 3.0 * image @ text[:, k].T
        expected = sum(torch.nn.functional.cross_entropy(v, labels, label_smoothing=0.2) for v in (z, z.T)) / 2
        got = reference.multi_positive_contrastive_loss(image, text[:, k : k + 1], 3.0, label_smoothing=0.2)
        torch.testing.assert_close(got, expected)


def test_smoothed_sums_inside_the_logarithm():
    """eq. 7 with eq. 22: the target is the logarithm of the sum, then the mean over all captions."""
    image, text, _, mask = random_case()
    n, k = mask.shape
    row, col = [], []
    for i in range(n):
        valid = [(i, i, c) for c in range(k) if mask[i, c]]
        everything = [(i, j, c) for j in range(n) for c in range(k) if mask[j, c] and (i == j or IDS[i] != IDS[j])]
        z = lambda pairs: [float(2.0 * image[i] @ text[j, c]) for i, j, c in pairs]  # noqa: E731
        if valid:
            row.append(lse(z(everything)) - 0.9 * lse(z(valid)) - 0.1 * mean(z(everything)))
        for own in valid:
            others = [(j, i, own[2]) for j in range(n) if i == j or IDS[i] != IDS[j]]
            col.append(lse(z(others)) - 0.9 * z([own])[0] - 0.1 * mean(z(others)))
    options = dict(negatives="all", positives="logsum", label_smoothing=0.1, image_ids=IDS)
    got = reference.multi_positive_contrastive_loss(image, text, 2.0, text_mask=mask, **options)
    assert got.item() == pytest.approx((mean(row) + mean(col)) / 2, abs=1e-12)


def test_per_slot_loss_is_the_mean_of_clip_losses():
    image, text, _, _ = random_case()
    labels = torch.arange(len(image))
    clip = [
        (
            torch.nn.functional.cross_entropy(image @ text[:, k].T, labels)
            + torch.nn.functional.cross_entropy(text[:, k] @ image.T, labels)
        )
        / 2
        for k in range(text.shape[1])
    ]
    torch.testing.assert_close(reference.multi_positive_contrastive_loss(image, text, 1.0), torch.stack(clip).mean())


@pytest.mark.parametrize("options", [{}, {"same_image": "ignore"}, {"same_image": "positive", "label_smoothing": 0.2}])
@pytest.mark.parametrize("masked", [False, True])
def test_sigmoid_loss_against_loops(masked, options):
    image, text = clip_like(4, 3, 8, torch.float64)
    ids = torch.tensor([1, 2, 1, 1]) if options else torch.arange(4)
    smoothing = options.get("label_smoothing", 0.0)
    mask = (
        torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) > 0.3
        if masked
        else torch.ones(4, 3, dtype=torch.bool)
    )
    total = 0.0
    for j in range(4):
        for i in range(4):
            for k in range(3):
                positive = ids[i] == ids[j]
                if mask[i, k] and (i == j or not positive or options.get("same_image") == "positive"):
                    z = float(5.0 * image[j] @ text[i, k] - 2.0)
                    label = 1 - smoothing / 2 if positive else smoothing / 2
                    total += label * math.log1p(math.exp(-z)) + (1 - label) * math.log1p(math.exp(z))
    options = options | (dict(image_ids=ids) if options else {})
    got = reference.multi_positive_sigmoid_loss(image, text, 5.0, -2.0, text_mask=mask if masked else None, **options)
    assert got.item() == pytest.approx(total / int(mask.sum()), rel=1e-12)


def test_reduction_none_averages_to_the_loss_and_is_zero_where_masked():
    image, text, _, mask = random_case()
    for loss in (reference.multi_positive_contrastive_loss, reference.multi_positive_sigmoid_loss):
        pairs = loss(image, text, 1.3, text_mask=mask, reduction="none")
        assert pairs.shape == mask.shape
        assert (pairs[~mask] == 0).all()
        torch.testing.assert_close(pairs.sum() / mask.sum(), loss(image, text, 1.3, text_mask=mask))


def test_a_captions_sigmoid_loss_is_of_all_images():
    image, text, _, _ = random_case()
    sign = torch.tensor([1, -1, -1, -1, -1])
    got = reference.multi_positive_sigmoid_loss(image, text, 2.0, -1.0, reduction="none")
    expected = -torch.nn.functional.logsigmoid(sign * (2 * image @ text[0, 1] - 1)).sum()
    torch.testing.assert_close(got[0, 1], expected)


def test_identical_embeddings_give_log_n():
    image, text = torch.ones(6, 4).double(), torch.ones(6, 3, 4).double()
    assert reference.multi_positive_contrastive_loss(image, text, 5.0).item() == pytest.approx(math.log(6))
    pooled = reference.multi_positive_contrastive_loss(image, text, 5.0, negatives="all").item()
    assert pooled == pytest.approx((math.log(18) + math.log(6)) / 2)


@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
@pytest.mark.parametrize("padded", [False, True])
def test_group_patches_against_loops(normalization, threshold, padded):
    _, text, patches, _ = random_case(seed=3)
    n, p, _ = patches.shape
    patch_mask = torch.ones(n, p, dtype=torch.bool)
    if padded:
        patch_mask[:, -2:] = False
        patch_mask[2, 0] = False
    got = reference.group_patches(
        patches, text, threshold=threshold, normalization=normalization, patch_mask=patch_mask if padded else None
    )
    for i in range(n):
        valid = [m for m in range(p) if patch_mask[i, m]]
        sigma = 1 / len(valid) if threshold is None else threshold
        for k in range(text.shape[1]):
            w = {m: float(unit(text[i, k]) @ unit(patches[i, m])) for m in valid}
            if normalization == "minmax":
                lo, hi = min(w.values()), max(w.values())
                w = {m: (v - lo) / (hi - lo) for m, v in w.items()}
            elif normalization == "softmax":
                total = sum(math.exp(v) for v in w.values())
                w = {m: math.exp(v) / total for m, v in w.items()}
            kept = {m: max(v, 0.0) for m, v in w.items() if v >= sigma}
            if sum(kept.values()) == 0:
                kept = dict.fromkeys(valid, 1.0)
            expected = sum(v / sum(kept.values()) * unit(patches[i, m]) for m, v in kept.items())
            torch.testing.assert_close(got[i, k], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("contrast", ["image", "batch"])
@pytest.mark.parametrize("direction", ["both", "t2v"])
@pytest.mark.parametrize("masked", [False, True])
def test_grouping_loss_against_loops(contrast, direction, masked):
    _, text, patches, mask = random_case(seed=5)
    n, k = mask.shape
    mask = mask if masked else torch.ones_like(mask)
    s = 3.1
    group = reference.group_patches(patches, text)
    pairs = [(i, c) for i in range(n) for c in range(k) if mask[i, c]]
    z = lambda a, b: float(s * unit(group[a]) @ unit(text[b]))  # noqa: E731
    terms = []
    for a in pairs:
        rivals = [b for b in pairs if contrast == "batch" or b[0] == a[0]]
        t2v = lse([z(b, a) for b in rivals]) - z(a, a)
        v2t = lse([z(a, b) for b in rivals]) - z(a, a)
        terms.append(t2v if direction == "t2v" else (t2v + v2t) / 2)
    got = reference.subcaption_grouping_loss(
        patches, text, s, text_mask=mask if masked else None, contrast=contrast, direction=direction
    )
    assert got.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_an_image_with_one_caption_contributes_nothing_within_itself():
    _, text, patches, _ = random_case()
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[:, 1] = True
    assert reference.subcaption_grouping_loss(patches, text, 7.0, text_mask=mask).item() == pytest.approx(
        0.0, abs=1e-12
    )


def test_planted_groups_are_found():
    """Each caption equals one patch direction: with a high threshold its group is exactly that patch."""
    patches = torch.eye(8, dtype=torch.float64)[None].repeat(2, 1, 1)
    text = 3 * torch.eye(8, dtype=torch.float64)[[1, 4, 6]][None].repeat(2, 1, 1)
    weights = reference.patch_weights(patches, text, threshold=0.5)
    assert weights.argmax(-1).tolist() == [[1, 4, 6]] * 2
    torch.testing.assert_close(weights.max(-1).values, torch.ones(2, 3, dtype=torch.float64))


def test_everything_masked_is_zero_with_zero_gradient():
    image, text, patches, _ = (t.requires_grad_() if t.is_floating_point() else t for t in random_case())
    none = torch.zeros(5, 3, dtype=torch.bool)
    losses = [
        reference.multi_positive_contrastive_loss(image, text, 9.0, text_mask=none, negatives=m)
        for m in ("slot", "all")
    ]
    losses += [
        reference.subcaption_grouping_loss(patches, text, 9.0, text_mask=none, contrast=c) for c in ("image", "batch")
    ]
    for loss in losses:
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, (image, text, patches), allow_unused=True):
            assert grad is None or (grad == 0).all()
