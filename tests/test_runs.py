"""The run folder: who may work in it, where it may go, and what a damaged recipe says."""

import shutil
import subprocess
import sys

import pytest

from umarvel_ray.errors import UserError
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run


def open_run(folder, *changes: str) -> Run:
    return Run.open(load_recipe("demo", [f"output={folder}", *changes]))


def test_two_jobs_never_work_in_one_folder(tmp_path):
    run = open_run(tmp_path / "run")
    with run.held():
        with pytest.raises(UserError, match=rf"another job is working in {run.dir}; wait"), run.held():
            pass
        code = f"from tests.test_runs import open_run\nwith open_run({str(run.dir)!r}).held(): pass"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "UserError: another job is working in" in ended.stderr
    with run.held():
        pass


def test_a_folder_may_be_moved_but_not_change_its_recipe(tmp_path):
    folder = open_run(tmp_path / "run").dir
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(folder, moved)
    assert open_run(moved).dir == moved
    with pytest.raises(UserError, match=r"created by another recipe \('seed' differs\)"):
        open_run(moved, "seed=7")


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n"])
def test_a_damaged_recipe_is_one_line(tmp_path, text):
    folder = open_run(tmp_path / "run").dir
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged"):
        open_run(folder)
