"""All that is wrong with a dataset is named at once; tables come from inside its folder."""

import pytest
from PIL import Image

from medmask.config.data import Dataset
from medmask.data.isic import CLASSES
from medmask.data.pack import write_pack
from medmask.data.readers import read_source
from medmask.errors import DataError


@pytest.fixture
def root(tmp_path):
    """A folder with one image, one file that is no image, and the folder where ISIC 2019 has both."""
    root = tmp_path / "root"
    for folder in (root, root / "ISIC_2019_Training_Input"):
        folder.mkdir()
        Image.new("L", (4, 3)).save(folder / "good.jpg")
        (folder / "bad.jpg").write_text("no image")
    return root


def problems(root, lines, **settings) -> list[str]:
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    cfg = Dataset(**{"reader": "csv", "labels": "table.csv", **settings})
    with pytest.raises(DataError) as caught:
        write_pack(read_source(root, cfg), root / "images.npy", root / "index.npy", None)
    return [line.strip().removeprefix(f"{root}/") for line in str(caught.value).splitlines()]


def test_all_kinds_of_problems_at_once(root):
    lines = ["image_path,label", "good.jpg,cat", "", "good.jpg", "bad.jpg,dog", "good.jpg,", "gone.jpg,eel"]
    (root / "list.csv").write_text("good.jpg\n\nnone.jpg\n")
    found = problems(root, lines, classes=["cat", "dog"], lists={"some": "list.csv"})
    assert found == [
        "dataset: 9 problems:",
        "table.csv:3: empty line",
        "table.csv:4: need 2 columns, got 1",
        "table.csv:6: image_id 'good.jpg': stands twice",
        "table.csv:6: class_name '': empty, or has a line break",
        "list.csv:2: empty line",
        "list.csv:3: image 'none.jpg' is not in the dataset",
        "table.csv:7: unknown label 'eel', not in `classes` (cat, dog)",
        f"table.csv:5: {root}/bad.jpg: cannot be read as an image: UnidentifiedImageError: "
        f"cannot identify image file '{root}/bad.jpg'",
        f"table.csv:7: no such file: {root}/gone.jpg",
    ]


def test_all_kinds_of_problems_of_isic_at_once(root):
    good = [f"good,{','.join(str(float(name == wanted)) for name in CLASSES)}" for wanted in ("NV", "BCC")]
    none = "bad," + ",".join(["0.0"] * len(CLASSES))
    (root / "ISIC_2019_Training_Metadata.csv").write_text("image,lesion_id\ngood,a\ngood,a\nbad\n")
    found = "\n".join(problems(root, [good[0], good[1], "", none, none[:-4]], reader="isic2019"))
    for part in (
        "table.csv:2: image_id 'good': stands twice",
        "table.csv:3: empty line",
        "table.csv:4: need a single 1",
        "table.csv:5: need 10 columns, got 9",
        "Metadata.csv:3: image 'good' stands twice",
        "Metadata.csv:4: need 2 columns, got 1",
        f"table.csv:4: {root}/ISIC_2019_Training_Input/bad.jpg: cannot be read as an image",
    ):
        assert part in found


def test_a_table_without_rows(root):
    assert problems(root, ["image_path,label"]) == ["table.csv: has no rows below its header"]
    assert problems(root, ["image," + ",".join(CLASSES)], reader="isic2019") == ["table.csv: no images"]


@pytest.mark.parametrize("name", ["table.csv", "list.csv"])
def test_tables_through_a_link_out_of_the_folder_are_refused(root, name):
    (root / name).symlink_to(root.parent / "outside.csv")
    (root.parent / "outside.csv").write_text("image_path,label\ngood.jpg,x\n")
    (found,) = problems(root, ["image_path,label", "good.jpg,x"], lists={"some": "list.csv"} if "list" in name else {})
    assert found == f"path outside {root}: {name} is a link to {root.parent}/outside.csv"
