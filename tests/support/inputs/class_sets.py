"""Classification sets made here: a folder of images by class, and clip_benchmark's webdataset layout."""

from collections.abc import Callable, Sequence
from pathlib import Path

from shard_files import jpeg, write_tar


def write_class_folders(folder: Path, classes: Sequence[str], count: int) -> Path:
    """FOLDER/CLASS/N.jpg, the classes in turn."""
    for i in range(count):
        inner = folder / classes[i % len(classes)].replace(" ", "_")
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{i}.jpg").write_bytes(jpeg(i, 48))
    return folder


def write_class_shard(
    folder: Path,
    classes: Sequence[str],
    count: int,
    *,
    label: Callable[[int], int] | None = None,
    picture: Callable[[int], bytes] = lambda i: jpeg(i, 48),
    templates: Sequence[str] = ("a photo of a {c}.", "a bad photo of a {c}."),
) -> Path:
    """FOLDER/test/0.tar and 1.tar of ``count`` samples together; labels go through the classes in turn."""
    members = []
    for i in range(count):
        number = label(i) if label else i % len(classes)
        members += [(f"{i:04d}.jpg", picture(i)), (f"{i:04d}.cls", str(number).encode())]
    write_tar(folder / "test" / "0.tar", members[: count // 2 * 2])
    write_tar(folder / "test" / "1.tar", members[count // 2 * 2 :])
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(classes))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    return folder
