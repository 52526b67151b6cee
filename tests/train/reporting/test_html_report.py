"""The page of a run: what its evaluations wrote is in it."""

import json

from dreamlip_train.reporting.html_report import _evaluations


def test_what_eval_wrote_into_the_run_is_on_its_page(tmp_path):
    way = {f"r_at_{k}": 12.5 for k in (1, 5, 10)}
    scores = {"t2i": way, "i2t": way, "chance": {"t2i": way, "i2t": way}, "images": 1000, "captions": 5000}
    told = {"command": "retrieval-set", "annotations": "dataset_<flickr30k>.json"}
    (tmp_path / "flickr.json").write_text(json.dumps({"evaluation": told} | scores))
    (tmp_path / "summary.json").write_text('{"retrieval": {}}')
    page = _evaluations(tmp_path)
    assert "1000 images, 5000 captions" in page and "12.5" in page and "dataset_&lt;flickr30k&gt;.json" in page
    (tmp_path / "flickr.json").unlink()
    assert _evaluations(tmp_path) == ""
