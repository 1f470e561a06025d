import pytest

pytest.register_assert_rewrite("training.commands")  # its comparisons are to show what they compared
