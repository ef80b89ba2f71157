"""Writing that is never seen half done; shipped folders."""

import pytest

from intactkv_eval.files import shipped_folder, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    write_atomic(target, lambda partial: partial.write_text("old"))

    def fail(partial):
        partial.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomic(target, fail)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_shipped_folders_are_the_checkouts():
    assert (shipped_folder("tasks") / "ppl" / "ppl_wikitext2.yaml").is_file()
    assert (shipped_folder("model_configs") / "chat_templates" / "vicuna_v1.1.jinja").is_file()
