"""Batch scripts hold no secrets, whatever a cluster's YAML refers to, and nothing that the command line refers to."""

from __future__ import annotations

from pathlib import Path

import pytest

from made import cache as small_cache
from pipeline import cli
from pipeline.errors import ConfigError
from pipeline.jobs.cluster import load_cluster
from pipeline.jobs.secrets import require_no_secrets

SECRET = "FAKEsecretKEY/abc+123456789"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own clusters."""
    (tmp_path / "conf" / "cluster").mkdir(parents=True)
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path / "conf"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("SITE_ACCOUNT", "physics")
    return tmp_path / "conf" / "cluster"


@pytest.mark.parametrize(
    "key", ["account", "partition", "logs", "python", "setup: ['export X=%s']", "options: ['--comment=%s']"]
)
def test_a_cluster_takes_nothing_from_the_environment(
    cluster: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its values are written into scripts, which stay."""
    for name in ("AWS_SECRET_ACCESS_KEY", "SITE_ACCOUNT"):
        reference = f"${{oc.env:{name}}}"
        (cluster / "evil.yaml").write_text((key % reference if "%" in key else f"{key}: {reference}") + "\n")
        assert cli.main(["submit", "encode", "cluster=evil", "source=a.tar", "dest=b", "--dry-run"]) == 1
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
        assert "physics" not in said.out + said.err
        assert reference in said.err
        with pytest.raises(ConfigError, match="written into the batch script"):
            load_cluster(["cluster=evil"])


def test_a_secret_that_is_written_out_is_refused_in_the_scripts_of_a_sweep(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "evil.yaml").write_text(f"account: {SECRET}\ngpus: 0\n")
    small_cache.make_cache(str(tmp_path / "cache"), [16])
    words = [
        f"data.train={tmp_path}/cache",
        f"run={tmp_path}/r",
        "model=tiny",
        "model.context_width=8",
        "deepspeed=off",
    ]
    words += ["optim.batch=8", "optim.lr=1,2", "samples=16", "cluster=evil", "--dry-run"]
    assert cli.main(["train", "-m", *words]) == 1
    said = capsys.readouterr()
    assert "optim.lr=1: the batch script would hold the value of AWS_SECRET_ACCESS_KEY" in said.err
    assert SECRET not in said.out + said.err


def test_short_values_and_other_names_are_no_secrets() -> None:
    require_no_secrets("#SBATCH --account=abc\npython x", {"API_KEY": "abc", "HOME": "python x", "MONKEY": "python x"})
    with pytest.raises(ConfigError, match=r"the value of MY_TOKEN \(after '#SBATCH --account='\)"):
        require_no_secrets("a\n#SBATCH --account=0123456789", {"MY_TOKEN": "0123456789"})


def test_the_check_of_nodes_gets_the_words_as_they_were_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not what they mean: a reference stays one in the script."""
    small_cache.make_cache(str(tmp_path / "cache"), [16])
    words = [
        f"data.train={tmp_path}/cache",
        f"run={tmp_path}/r",
        "model=tiny",
        "model.context_width=8",
        "optim.batch=8",
    ]
    cli.main(["submit", "train", "cluster.gpus=0", *words, "samples=16", "--dry-run"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "pipeline.jobs.nodes" in line]
    assert f" -P -m pipeline.jobs.nodes words 1 0 train {' '.join(words)} samples=16 || exit $?" in line
