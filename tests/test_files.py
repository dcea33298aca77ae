"""Files are written whole or not at all, and nothing unsafe or damaged is loaded."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from visar.io.files import atomic_write, load_weights, sha256, tensors_only


def test_atomic_write_replaces_or_leaves_alone(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_write(target) as path:
        path.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    with pytest.raises(RuntimeError), atomic_write(target) as path:
        path.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "first"
    assert os.listdir(target.parent) == ["file.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"), atomic_write(tmp_path / "file" / "below.txt"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder"), atomic_write(tmp_path / "folder") as path:
        path.write_text("x")


def test_weights_round_trip(tmp_path):
    weights = {"a": torch.randn(3), "b": torch.arange(4)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"model": weights}, tmp_path / "w.pt")
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["a"], weights["a"])
    assert torch.equal(load_weights(tmp_path / "w.pt")["model"]["b"], weights["b"])
    assert len(sha256(tmp_path / "w.pt")) == 64


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_files(tmp_path, name, keep):
    if name.endswith(".pt"):
        torch.save({"a": torch.randn(100)}, tmp_path / name)
    else:
        save_file({"a": torch.randn(100)}, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=f"{name}.*(truncated|refused)"):
        load_weights(tmp_path / name)


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    marker = tmp_path / "ran"
    if zipped:
        torch.save({"a": _Code(marker)}, tmp_path / "bad.pt")
    else:
        (tmp_path / "bad.pt").write_bytes(pickle.dumps({"a": _Code(marker)}))
    with pytest.raises(ValueError, match=r"bad\.pt is refused"):
        load_weights(tmp_path / "bad.pt")
    assert not marker.exists()


def test_missing_and_strange_files(tmp_path):
    with pytest.raises(ValueError, match="no weights file"):
        load_weights(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list"):
        load_weights(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"b \(int\)"):
        tensors_only({"a": torch.zeros(1), "b": 3}, "file.pt")
