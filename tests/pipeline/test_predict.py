"""Labelling images overwrites none of them."""

import pytest

from hpc.cli import UserError
from pipeline import predict


@pytest.mark.parametrize(
    ("images", "out", "reason"),
    [
        (["pics/holiday.png"], "pics", "a map would replace the image pics/holiday.png"),
        (["pics/a.jpg", "pics/b/a.jpg"], "out", "2 maps would be called a.png"),
        (["a.png", "a-confidence.png"], "out", "2 maps would be called a-confidence.png"),
        (["a.jpg", "out/a-confidence.png"], "out", "2 maps would be called a-confidence.png"),
        (["pics/a.jpg", "x/../out/a.png"], "out", "2 maps would be called a.png"),
        (["x/../pics/a.png"], "./pics", "a map would replace the image pics/a.png"),
    ],
)
def test_maps_that_would_replace_an_image_or_each_other_are_refused(
    images, out, reason, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for image in images:
        path = tmp_path / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"the only copy")
    with pytest.raises(UserError) as refused:
        predict.main(["no cell", *images, "--out", out])
    assert str(refused.value).startswith(reason)
    assert all((tmp_path / image).read_bytes() == b"the only copy" for image in images)
