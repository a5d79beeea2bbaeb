"""Resumable output that is interrupted at any point."""

import pyarrow as pa
import pytest

from umarvel_ray.inference import shards
from umarvel_ray.inference.shards import close_output, is_complete, open_output, read_shards, write_shard

ROWS = pa.table({"value": [1]})


def fill(folder, inputs) -> None:
    for index in open_output(folder, inputs, 2):
        write_shard(folder, index, ROWS.set_column(0, "value", pa.array([inputs["of"]])), [])
    close_output(folder, 2)


@pytest.mark.parametrize("call", range(4))
def test_output_of_other_inputs_never_passes_as_complete(tmp_path, monkeypatch, call):
    """A manifest or a file that is about to be written or removed when the process dies."""
    fill(tmp_path, {"of": 1})
    made = 0

    def dying(act):
        def once(*args, **kwargs):
            nonlocal made
            made += 1
            if made > call:
                raise KeyboardInterrupt
            return act(*args, **kwargs)

        return once

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_manifest", dying(shards._write_manifest))
        patch.setattr("pathlib.Path.unlink", dying(type(tmp_path).unlink))
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path, {"of": 2})
    if is_complete(tmp_path):
        assert read_shards(tmp_path)["value"].to_pylist() == [1, 1]
    fill(tmp_path, {"of": 2})
    assert read_shards(tmp_path)["value"].to_pylist() == [2, 2]


def test_finished_shards_are_kept(tmp_path):
    assert open_output(tmp_path, {"of": 1}, 2) == [0, 1]
    write_shard(tmp_path, 1, ROWS, [])
    assert open_output(tmp_path, {"of": 1}, 2) == [0]
    assert open_output(tmp_path, {"of": 2}, 2) == [0, 1]
