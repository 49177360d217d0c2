"""Whose a run's folder is."""

import os
from pathlib import Path

import pytest

from laclip.config import load_config
from laclip.run_folder import goes_on, open_folder, write_status
from laclip.train import parse_arguments, read_config
from laclip.typed_toml import dump

FIRST, SECOND = (load_config(None, [f"optimizer.lr={rate}"]) for rate in ("1e-3", "2e-3"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_a_run_that_has_begun_is_kept_from_another_configuration(folder):
    open_folder(folder, FIRST, False).close()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.001 -> 0\.002"):
        open_folder(folder, SECOND, False)
    (folder / "metrics.jsonl").unlink()
    write_status(folder, "resumable", 4)
    with pytest.raises(ValueError, match="holds an unfinished run of another configuration"):
        open_folder(folder, SECOND, False)


def test_a_mistake_that_ended_a_run_before_its_first_step_may_be_mended(folder):
    open_folder(folder, FIRST, False).close()
    write_status(folder, "resumable", None, "make no step")
    open_folder(folder, SECOND, False).close()
    assert load_config(folder / "config.toml") == SECOND


@pytest.mark.parametrize("state", ["running", "finished"])  # its report is still being written
def test_a_folder_in_which_a_job_runs_is_left_to_it(state, folder):
    with open_folder(folder, FIRST, False):
        write_status(folder, state, 8)
        for resume in (False, True):
            with pytest.raises(ValueError, match="another job is running in"):
                open_folder(folder, FIRST, resume)
    open_folder(folder, FIRST, False).close()
    assert folder.with_name("run.1").exists() == (state == "finished")


def test_finished_runs_are_kept_when_they_are_run_again(folder, capsys):
    for number in ("first", "second"):
        open_folder(folder, FIRST, False).close()
        (folder / "metrics.jsonl").write_text(number)
        write_status(folder, "finished", 8)
    open_folder(folder, SECOND, False).close()
    assert f"is kept as '{folder}.2'" in capsys.readouterr().out
    kept = [folder.with_name(f"run.{n}") / "metrics.jsonl" for n in (1, 2)]
    assert [path.read_text() for path in kept] == ["first", "second"]
    assert not (folder / "metrics.jsonl").exists()
    assert load_config(folder / "config.toml") == SECOND


def test_a_folder_in_which_a_start_failed_may_be_used(folder):
    folder.mkdir()
    for name in (".lock", "config.toml.partial"):
        (folder / name).touch()
    open_folder(folder, FIRST, False).close()
    assert load_config(folder / "config.toml") == FIRST


def test_the_configuration_is_on_the_disk_before_it_takes_the_old_ones_place(folder, monkeypatch):
    synced = []

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}")
        synced.append((path.read_text() if path.is_file() else "its folder", stored.exists()))

    stored = folder / "config.toml"
    monkeypatch.setattr(os, "fsync", sync)
    open_folder(folder, FIRST, False).close()
    assert synced == [(dump(FIRST), False), ("its folder", True)]
    assert stored.read_text() == dump(FIRST)


def test_a_start_goes_on_where_a_checkpoint_stays(folder):
    assert not goes_on(folder, False)
    open_folder(folder, FIRST, False).close()
    assert not goes_on(folder, False)
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.with_name(f"{checkpoint.name}.partial").mkdir(parents=True)
    assert not goes_on(folder, False)
    for name in (f"damaged_{checkpoint.name}", checkpoint.name):
        checkpoint.with_name(name).mkdir()
        assert goes_on(folder, False)
        checkpoint.with_name(name).rmdir()
    checkpoint.mkdir()
    write_status(folder, "finished", 8)  # kept under another name, unless it is named
    assert goes_on(folder, True) and not goes_on(folder, False)
    assert not goes_on(folder / "config.toml", False)  # a file, which open_folder refuses


def test_files_of_another_kind_are_left_alone(folder):
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files but no run"):
        open_folder(folder, FIRST, False)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ['with "quotes"', "back\\slash", "two\nlines", "ünïcode"])
def test_a_folder_of_any_name_is_gone_on_with(name, folder):
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.toml").write_text(dump(FIRST))
    words = ["--deepspeed_config", "zero1.json", "--resume", str(run)]
    assert read_config(parse_arguments(words)).run.folder == str(run)
