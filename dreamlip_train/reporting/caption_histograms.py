"""``prepare stats``: how many sub-captions and tokens a caption has, by source, as a table and a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dreamlip_train.captions.columns import CAPTION_COLUMNS, Splitter, caption_pool
from dreamlip_train.captions.statistics import CountTokens, percentile
from dreamlip_train.data.shards.shard_names import list_shards
from dreamlip_train.data.shards.shards import ShardError, read_shard, record_of
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError

_PERCENTILES = (50, 90, 95, 99)
_KINDS = ("sub_captions", "tokens", "sub_caption_tokens")
Histograms = dict[str, dict[str, Counter[int]]]


def caption_histograms(
    pattern: str, count_tokens: CountTokens, *, max_shards: int = 0, splitter: Splitter = "sentence"
) -> Histograms:
    """{source: {"sub_captions": how many a caption has, "tokens": of the whole caption, "sub_caption_tokens"}},
    each a Counter.

    Raises:
        UserError: no shard matches, or none has a caption.
    """
    shards = list_shards(pattern, field="PATTERN")
    if max_shards and max_shards < len(shards):
        shards = [shards[i * len(shards) // max_shards] for i in range(max_shards)]
    total: Histograms = {}
    with Progress(f"stats {pattern}", len(shards), "shards") as progress:
        for histograms in map_bounded(lambda shard: _of_shard(shard, count_tokens, splitter), shards):
            for source, kinds in histograms.items():
                own = total.setdefault(source, {kind: Counter() for kind in _KINDS})
                for kind, histogram in kinds.items():
                    own[kind].update(histogram)
            progress.advance()
    if not total:
        raise UserError(f"PATTERN: no sample of {pattern!r} has a caption in {', '.join(CAPTION_COLUMNS)}")
    order = [*CAPTION_COLUMNS, *sorted(total)]
    return dict(sorted(total.items(), key=lambda item: order.index(item[0])))


def _of_shard(shard: str, count_tokens: CountTokens, splitter: Splitter) -> Histograms:
    histograms: Histograms = {}
    try:
        for sample in read_shard(shard):
            try:
                record = record_of(sample)
            except ValueError:
                continue
            for source in (name for name in record if name in CAPTION_COLUMNS or name.endswith("_captions")):
                pieces = [piece.text for piece in caption_pool(record, [source], splitter)]
                if not pieces:
                    continue
                kinds = histograms.setdefault(source, {kind: Counter() for kind in _KINDS})
                lengths = [count_tokens(piece) for piece in pieces]
                kinds["sub_captions"][len(pieces)] += 1
                kinds["tokens"][sum(length - 2 for length in lengths) + 2] += 1
                kinds["sub_caption_tokens"].update(lengths)
    except ShardError:
        pass  # `prepare validate` reports it
    return histograms


def mean(histogram: Counter[int]) -> float:
    """The counted values' mean."""
    return sum(value * count for value, count in histogram.items()) / histogram.total()


def format_histograms(histograms: Histograms) -> str:
    """The table, sub-captions and tokens side by side, and how many are cut."""
    head = f"{'source':<20}{'captions':>10}{'sub-captions':>14}{'tokens':>9}{'tokens of a sub-caption: mean':>31}"
    head += "".join(f"{f'p{p}':>6}" for p in _PERCENTILES)
    lines = [head]
    for source, kinds in histograms.items():
        lengths = kinds["sub_caption_tokens"]
        lines.append(
            f"{source:<20}{kinds['sub_captions'].total():>10}{mean(kinds['sub_captions']):>14.2f}"
            f"{mean(kinds['tokens']):>9.1f}{mean(lengths):>31.1f}"
            + "".join(f"{percentile(lengths, p):>6}" for p in _PERCENTILES)
        )
    over = sum(
        count for kinds in histograms.values() for length, count in kinds["sub_caption_tokens"].items() if length > 77
    )
    every = sum(kinds["sub_caption_tokens"].total() for kinds in histograms.values())
    lines.append(f"{over / every:.2%} of the sub-captions are longer than 77 tokens, the context of CLIP, and are cut")
    return "\n".join(lines)


def plot_histograms(histograms: Histograms, png: str | Path) -> None:
    """Two panels: the share of captions with each number of sub-captions, and with each number of tokens,
    one line per source.
    """
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from dreamlip_train.reporting.style import COLORS, STYLE, legend_label, save_figure

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for axis, kind, title, width in (
            (axes[0], "sub_captions", "Sub-captions per caption", 1),
            (axes[1], "tokens", "Tokens per caption", 8),
        ):
            for number, (source, kinds) in enumerate(histograms.items()):
                if (
                    kind == "sub_captions"
                    and max(kinds[kind]) == 1
                    and any(max(other[kind]) > 1 for other in histograms.values())
                ):
                    continue  # raw and short captions are one each: a line at 1 would dwarf the others
                points = _shares(kinds[kind], width)
                style = {"color": COLORS[number % len(COLORS)], "linestyle": "-" if number < len(COLORS) else "--"}
                axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    label=legend_label(f"{source} (mean {mean(kinds[kind]):.1f})"),
                    **style,
                )
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set(title=title, ylabel="% of the captions", xlabel=title.split()[0].lower())
            axis.set_ylim(bottom=0)
            axis.legend()
        save_figure(figure, png)


def _shares(histogram: Counter[int], width: int) -> list[tuple[float, float]]:
    """(middle of the bin, percent), from an empty bin before to 99 % of the counted:
    a few outliers would squeeze the rest.
    """
    binned: Counter[int] = Counter()
    for value, count in histogram.items():
        binned[value // width] += count
    last = percentile(histogram, 99) // width
    return [
        ((b + (0.5 if width > 1 else 0)) * width, 100 * binned[b] / histogram.total())
        for b in range(max(0, min(binned) - 1), last + 2)
    ]
