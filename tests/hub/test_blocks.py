import pytest
import yaml

from dar_hf.hub.blocks import merge_cards, replace_block, sign


def card(about="generated", use="code", metadata="license: mit", after=""):
    blocks = "".join(
        f"<!-- dar-hf:{name} -->\n{text}\n<!-- /dar-hf:{name} -->\n\n"
        for name, text in (("about", about), ("use", use))
    )
    return f"---\n{metadata}\n---\n\n" + sign(blocks) + after


def metadata(text):
    return yaml.safe_load(text.split("---")[1])


def test_what_nobody_touched_is_replaced():
    assert merge_cards(card("old", "old code"), card("new", "new code")) == card("new", "new code")


def test_the_same_card_changes_nothing():
    assert merge_cards(card(), card()) == card()


def test_an_edited_block_stays_and_the_others_are_replaced(caplog):
    edited = card("generated", "old code").replace("generated", "generated, and corrected by hand")
    merged = merge_cards(edited, card("new", "new code"))
    assert "corrected by hand" in merged and "new code" in merged and "\nnew\n" not in merged
    assert "'about' was edited by hand" in caplog.text
    assert merge_cards(merged, card("newer", "newer code")).count("corrected by hand") == 1


def test_line_ends_and_blanks_at_them_are_no_edits():
    windows = card("a\n\nb").replace("\n", "  \r\n")
    merged = merge_cards(windows, card("new"))
    assert "\nnew\n" in merged and "b" not in merged.split("about")[1]


def test_text_around_blocks_stays_where_it_is():
    old = card().replace("<!-- dar-hf:use", "## Between\n\n<!-- dar-hf:use") + "\n## After\n"
    merged = merge_cards(old, card("new", "new code"))
    assert merged.index("new\n") < merged.index("## Between") < merged.index("new code") < merged.index("## After")


def test_text_written_into_the_new_card_goes_along():
    assert merge_cards(card("old"), card("new", after="\nMine.\n")) == card("new", after="\nMine.\n")
    both = merge_cards(card(after="\nTheirs.\n"), card(after="\nMine.\n"))
    assert both.index("Theirs.") < both.index("Mine.")
    assert merge_cards(both, card(after="\nMine.\n")) == both


def test_a_deleted_block_stays_away():
    old = card()
    old = old[: old.index("<!-- dar-hf:use")]
    assert "new code" not in merge_cards(old, card("new", "new code"))
    assert "new code" not in merge_cards(old, card("new", "new code", after="\nMine.\n"))


def test_a_card_without_blocks_stays_whole_and_comes_first():
    merged = merge_cards("---\nlicense: cc0-1.0\n---\n# Own\n\nwords\n", card())
    assert merged.index("# Own\n\nwords") < merged.index("generated")
    assert metadata(merged) == {"license": "cc0-1.0"}
    assert merge_cards("just words", card()).startswith("---\nlicense: mit\n---\n")
    assert merge_cards("", card()) == card().replace("---\n\n<", "---\n\n<")


def test_metadata_of_people_wins_and_lists_are_joined(caplog):
    old = card(metadata="license: apache-2.0 # ours\nextra: 1\ntags: [a, b]")
    merged = merge_cards(old, card(metadata="license: mit\ntags: [b, c]\nlibrary_name: diffusers"))
    kept = {"license": "apache-2.0", "extra": 1}
    assert metadata(merged) == kept | {"tags": ["a", "b", "c"], "library_name": "diffusers"}
    assert "keeps license: apache-2.0" in caplog.text


def test_metadata_that_does_not_change_keeps_its_comments():
    assert "# ours" in merge_cards(card(metadata="license: mit # ours"), card())


def result(metric, value, tokens=None):
    args = "" if tokens is None else f", args: {{num_tokens: {tokens}}}"
    return f"{{type: {metric}, value: {value}, name: {metric}{args}}}"


def index(*metrics):
    dataset = "dataset: {name: d, type: d}"
    return f"model-index: [{{name: m, results: [{{task: {{type: t}}, {dataset}, metrics: [{', '.join(metrics)}]}}]}}]"


def test_results_are_updated_where_they_measure_the_same():
    old = card(metadata=index(result("fid", 9, 64), result("fid", 8), result("mine", 1)))
    merged = merge_cards(old, card(metadata=index(result("fid", 7, 64), result("psnr", 20))))
    found = {
        (metric["type"], metric.get("args", {}).get("num_tokens")): metric["value"]
        for group in metadata(merged)["model-index"][0]["results"]
        for metric in group["metrics"]
    }
    assert found == {("fid", 64): 7, ("fid", None): 8, ("mine", None): 1, ("psnr", None): 20}


def test_an_index_that_cannot_be_read_is_left_alone(caplog):
    merged = merge_cards(card(metadata="model-index: nonsense"), card(metadata=index(result("fid", 7))))
    assert metadata(merged)["model-index"] == "nonsense"
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("broken", ["a: [", "- a"])
def test_metadata_that_cannot_be_read_is_refused(broken):
    with pytest.raises(ValueError, match="existing card's metadata"):
        merge_cards(card(metadata=broken), card())


def test_replace_block():
    assert replace_block(card("a", "old"), card("b", "new"), "use") == card("a", "new")
    edited = card("a", "old").replace("old", "mine")
    assert replace_block(edited, card("b", "new"), "use") == edited
    assert replace_block("words", card(), "use") == "words"


def test_results_that_people_wrote_stay_as_they_are():
    theirs = """model-index:
- name: a
  results:
  - task: {type: t, name: Theirs}
    dataset: {type: d, name: D, note: hers}
    metrics: [{type: acc, value: 1, note: mine}]
    source: {name: s, url: "http://u"}
- name: b
  results: [{task: {type: t}, dataset: {type: e, name: E}, metrics: [{type: acc, value: 2}]}]"""
    new = card(metadata=index(result("fid", 7)))
    merged = merge_cards(card(metadata=theirs), new)
    before, after = yaml.safe_load(theirs)["model-index"], metadata(merged)["model-index"]
    assert after[0]["results"].pop() == metadata(new)["model-index"][0]["results"][0]
    assert after == before


@pytest.mark.parametrize("written", ["source: {name: s, url: u}", "note: mine"])
def test_pushing_again_adds_no_second_result(written):
    """The same data measured by others, or under another name of the task, is no reason to add a figure each time."""
    group = (
        f"{{task: {{type: t, name: Other}}, dataset: {{name: d, type: d}}, metrics: [{result('acc', 1)}], {written}}}"
    )
    new = card(metadata=index(result("fid", 7)))
    once = merge_cards(card(metadata=f"model-index: [{{name: m, results: [{group}]}}]"), new)
    assert merge_cards(once, new) == once and once.count("type: fid") == 1


@pytest.mark.parametrize("empty", ["model-index:", "model-index: null\ntags:"])
def test_empty_metadata_is_filled(empty):
    new = card(metadata=index(result("fid", 7)) + "\ntags: [a]")
    assert metadata(merge_cards(card(metadata=empty), new)) == metadata(new)


def test_a_card_written_by_hand_is_not_added_to_itself():
    own = "---\nlicense: mit\n---\n# Mine\n\nwords\n"
    assert merge_cards(own, own) == own
    assert merge_cards(own + "\nMore.\n", own) == own + "\nMore.\n"
    assert merge_cards(own, own + "\nMore.\n") == own + "\nMore.\n"
    assert merge_cards(own, card(after="\n# Mine\n\nwords\n")).count("words") == 1


def test_a_byte_order_mark_does_not_hide_the_metadata():
    assert metadata(merge_cards("\ufeff" + card(metadata="license: cc0-1.0"), card()))["license"] == "cc0-1.0"
