"""The page of a run: what its evaluations wrote is in it, and no text becomes markup."""

import json

import pytest

from dreamlip_train.config.schema import Config
from dreamlip_train.evaluation.comparison import Comparison
from dreamlip_train.reporting.html_report import evaluations_of, render_page, result_files, tables_of

WAY = {f"r_at_{k}": 12.5 for k in (1, 5, 10)}


def test_what_eval_wrote_into_the_run_is_on_its_page(tmp_path):
    scores = {"t2i": WAY, "i2t": WAY, "chance": {"t2i": WAY, "i2t": WAY}, "images": 1000, "captions": 5000}
    told = {"command": "retrieval-set", "annotations": "dataset_flickr30k.json"}
    (tmp_path / "flickr.json").write_text(json.dumps({"evaluation": told} | scores))
    (tmp_path / "summary.json").write_text('{"retrieval": {}}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    ((title, text),) = evaluations_of(result_files(tmp_path))
    assert title == "retrieval-set dataset_flickr30k.json" and "1000 images, 5000 captions" in text and "12.5" in text
    (tmp_path / "flickr.json").unlink()
    assert evaluations_of(result_files(tmp_path)) == []


def test_results_stand_in_the_papers_tables_wherever_they_were_written(tmp_path):
    scores = {"t2i": WAY, "i2t": WAY, "images": 1, "captions": 1, "evaluation": {"command": "retrieval-set"}}
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run / "eval", elsewhere):
        folder.mkdir(parents=True)
    (run / "eval" / "flickr30k.json").write_text(json.dumps(scores))
    (elsewhere / "coco-val2017.json").write_text(json.dumps(scores | {"i2t": {"r_at_1": 77.7}}))
    tables = tables_of(result_files(run, [elsewhere]))
    assert [table.title.split(":")[0] for table in tables[:8]] == [f"Table {number}" for number in range(1, 9)]
    assert tables[0].measured and "12.5" in tables[0].ours[1] and "77.7" in tables[0].ours[1]
    assert not any(table.measured for table in tables_of(result_files(tmp_path)))
    with pytest.raises(ValueError, match="--results: no file or folder '.*none'"):
        result_files(run, [tmp_path / "none"])


HOSTILE = "<script>alert('{{ 7 * 7 }}')</script>\"&{% raw %}"
MISSING = {"missing": HOSTILE}
PICTURE = {"image": "data:image/jpeg;base64,AA==", "kind": "own", "label": HOSTILE}
SECTIONS = {
    "training": MISSING,
    "retrieval": {"samples": 1000, "sentences": 2, "rows": [(HOSTILE, [(1.0, 0.5)])]},
    "localization": {"sub_captions": 3, "rows": [[HOSTILE, "1.0", "0.5"]]},
    "grouping": {"picture": "data:image/png;base64,AA=="},
    "examples": {"groups": [(HOSTILE, [{"caption": HOSTILE, "pictures": [PICTURE]}]), ("none", [])]},
    "data": {"sets": [[HOSTILE, "1", "2", HOSTILE]], "captions": [[HOSTILE, "1", "2", "3"]]},
    "settings": {"device": HOSTILE, "backends": HOSTILE, "versions": [(HOSTILE, HOSTILE)], "toml": HOSTILE},
}


@pytest.mark.parametrize("missing", [False, True])
def test_no_text_becomes_markup(missing):
    config = Config()
    config.model.name = config.data.sampling = HOSTILE
    config.data.caption_sources = [HOSTILE]
    sections = dict.fromkeys(SECTIONS, MISSING) if missing else SECTIONS
    page = render_page(
        name=HOSTILE,
        config=config,
        facts={HOSTILE: HOSTILE},
        evaluations=[(HOSTILE, HOSTILE)],
        tables=[Comparison(HOSTILE, HOSTILE, [HOSTILE], [[HOSTILE]], [[HOSTILE]])],
        **sections,
    )
    assert "<script" not in page and "49" not in page
    assert page.count("&lt;script&gt;alert(&#39;{{ 7 * 7 }}&#39;)&lt;/script&gt;&#34;&amp;{% raw %}") >= 12
    assert page.count("<h2>") == 9 and page.count("Not shown") == (7 if missing else 1)
