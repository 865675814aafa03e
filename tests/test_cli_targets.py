"""Output paths of the command line: one per image, checked before the work starts, with the settings inside."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tgate_compile import ConfigurationError
from tgate_compile._cli.console import check_folder, check_targets, image_paths, save_png


def test_one_image_gets_the_name_given(tmp_path: Path) -> None:
    assert image_paths(tmp_path / "fox.png", [7]) == [tmp_path / "fox.png"]


def test_several_images_tell_their_seeds(tmp_path: Path) -> None:
    paths = image_paths(tmp_path / "fox.png", [7, 8])
    assert paths == [tmp_path / "fox-seed-7.png", tmp_path / "fox-seed-8.png"]


def test_a_folder_gets_names_that_tell_the_seed(tmp_path: Path) -> None:
    assert image_paths(tmp_path / "v1.5", [7]) == [tmp_path / "v1.5" / "seed-7.png"]
    (tmp_path / "images.png").mkdir()
    assert image_paths(tmp_path / "images.png", [7]) == [tmp_path / "images.png" / "seed-7.png"]


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"fox\.jpg is not a \.png file.*Use .*fox\.png"):
        image_paths(tmp_path / "fox.jpg", [7])


def test_folders_are_made_and_existing_files_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "fox.png"
    check_targets([path], force=False)
    assert path.parent.is_dir()
    path.touch()
    with pytest.raises(ConfigurationError, match="already exists"):
        check_targets([path], force=False)
    check_targets([path], force=True)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigurationError, match="Cannot write to the folder"):
        check_folder(tmp_path / "taken")


def test_settings_are_kept_in_the_png(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    save_png(Image.new("RGB", (8, 8)), path, {"prompt": "ein Füchslein", "seed": 7, "lora": None})
    with Image.open(path) as image:
        image.load()
        assert image.text == {"prompt": "ein Füchslein", "seed": "7"}  # type: ignore[attr-defined]
