"""Names of a model and of data become a workbench; settings tell nothing about this machine."""

from lora_init.comparison.compare import circumstances, model_name


def test_a_directory_is_named_without_its_path(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    assert model_name(str(tmp_path / "model")) == "model"
    assert model_name("org/name") == "org/name"
    monkeypatch.chdir(tmp_path / "model")
    assert model_name(".") == "model"


def test_versions_and_threads():
    found = circumstances()
    assert set(found["versions"]) == {"lora_init", "torch", "transformers", "peft", "python"}
    assert found["threads"] >= 1 and isinstance(found["processor"], str)
