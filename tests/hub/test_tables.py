"""Tables of a card: settings and metrics as people read them."""

from huggingface_hub import EvalResult

from dar_hf.hub.tables import setting_text, tables


def result(kind, value, task="Image reconstruction", **settings):
    return EvalResult("task", "d", "D", kind, value, task, metric_name=kind.upper(), metric_args=settings or None)


def test_settings_as_people_write_them():
    assert [setting_text(value) for value in (2.0, 1.5, (1.1, 8.0), [3], 50000, "8, Euler")] == [
        *("2", "1.5", "1.1 → 8", "3", "50000", "8, Euler"),
    ]


def test_tables_have_one_row_per_metric_and_one_column_per_setting():
    previews, alone = tables(
        [
            result("psnr", 17.6, num_tokens=4),
            result("psnr", 18.45678, num_tokens=8),
            result("ssim", 0.5, num_tokens=8),
            result("usage", 0.99),
        ]
    )
    assert previews.title == alone.title == "Image reconstruction, D"
    assert previews.columns == ["num tokens", "4", "8"]
    assert previews.rows == [["PSNR", "17.6", "18.46"], ["SSIM", "", "0.5"]]
    assert alone.columns == ["", "value"] and alone.rows == [["USAGE", "0.99"]]


def test_settings_that_all_share_stand_in_the_title():
    common = {"count": 500, "guidance_scale": [1.1, 8.0]}
    (table,) = tables([result("fid", 9.0, num_tokens=4, **common), result("fid", 3.0, num_tokens=8, **common)])
    assert table.title == "Image reconstruction, D (count 500, guidance scale 1.1 → 8)"
    assert table.columns == ["num tokens", "4", "8"] and table.rows == [["FID", "9", "3"]]
    (table,) = tables([result("fid", 9.0, num_tokens=8), result("ssim", 0.5, num_tokens=8)])
    assert table.title == "Image reconstruction, D (num tokens 8)" and table.columns == ["", "value"]


def test_tables_lose_no_metric():
    first, second = tables([result("fid", 9.0, guidance_scale=1.5), result("fid", 3.0, num_tokens=8)])
    assert (first.columns, first.rows) == (["guidance scale", "1.5"], [["FID", "9"]])
    assert (second.columns, second.rows) == (["num tokens", "8"], [["FID", "3"]])
    titles = [table.title for table in tables([result("fid", 1.0, "A"), result("fid", 2.0), result("fid", 3.0, "A")])]
    assert titles == ["A, D", "Image reconstruction, D"]
    assert tables([]) == []
