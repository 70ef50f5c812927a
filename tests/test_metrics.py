import json
import math
import struct

import pytest

from rl_jax.run.metrics import describe_device, open_metrics, versions


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder):
    """Reads event files by TFRecord's layout: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = open_metrics(tmp_path)
    writer.write("rl", 3, {"reward": 0.5, "kl": math.nan, "loss": -math.inf, "length": 7})
    assert read_rows(tmp_path) == [{"stage": "rl", "step": 3, "reward": 0.5, "kl": None, "loss": None, "length": 7.0}]
    writer.close()


def test_tensorboard_has_the_same(tmp_path):
    writer = open_metrics(tmp_path)
    writer.write("pretrain", 0, {"loss": 4.25})
    writer.write("rl", 1, {"reward": 0.5, "kl": math.nan})
    writer.close()
    events = {(tag, step): value for tag, step, value in read_events(tmp_path)}
    assert events.keys() == {("pretrain/loss", 0), ("rl/reward", 1), ("rl/kl", 1)}
    assert events["pretrain/loss", 0] == 4.25
    assert events["rl/reward", 1] == 0.5
    assert math.isnan(events["rl/kl", 1])


@pytest.mark.parametrize("left", ['{"stage": "rl", "st', "", '{"stage": "rl", "step": 1}'])
def test_a_resumed_run_appends_after_the_last_whole_row(tmp_path, left):
    whole = '{"stage": "rl", "step": 0, "reward": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + left)
    writer = open_metrics(tmp_path)
    writer.write("rl", 1, {"reward": 2.0})
    writer.close()
    assert [(row["step"], row["reward"]) for row in read_rows(tmp_path)] == [(0, 1.0), (1, 2.0)]


def test_device_and_versions_are_described():
    assert describe_device().startswith("cpu x 8 (")
    found = versions()
    import jax

    assert found["jax"] == jax.__version__
    assert found["python"].startswith("3.")


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    writer = open_metrics(tmp_path)
    full = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        writer._replace(rows=full).write("rl", 0, {"loss": 1.0})
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        writer._replace(rows=full).close()

    def refuse():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.events, "flush", refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*tensorboard'"):
        writer.write("rl", 0, {"loss": 1.0})
    (tmp_path / "kept.jsonl").mkdir()
    with pytest.raises(OSError, match=r"kept.jsonl'"):
        writer.keep("kept", [])


def test_texts_are_kept_whole(tmp_path):
    rows = [{"prompt": "a\n", "completion": "é\u2028\ud83d".encode("utf-8", "replace").decode()}]
    writer = open_metrics(tmp_path)
    path = writer.keep("kept", rows)
    assert path == tmp_path / "kept.jsonl"
    assert [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] == rows
    writer.close()
