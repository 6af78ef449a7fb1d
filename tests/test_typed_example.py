"""The typed program of a user runs. That its types are right, pyright checks."""

import pytest
import typed_example


def test_runs(capsys: pytest.CaptureFixture[str]):
    typed_example.main()
    assert "Array(3., dtype=float32)" in capsys.readouterr().out
