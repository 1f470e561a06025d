import pytest
from transformers import AutoConfig, LlamaConfig

from dar_hf import DARConfig


def test_names_of_the_contract_beside_those_of_llama():
    config = DARConfig(
        codebook_size=32,
        num_classes=5,
        num_image_tokens=16,
        tokens_per_group=4,
        resid_dropout=0.2,
        ffn_dropout=0.3,
        token_dropout=0.4,
        class_dropout=0.5,
        hidden_size=64,
        num_hidden_layers=3,
    )
    assert isinstance(config, LlamaConfig) and config.model_type == "dar"
    assert (config.codebook_size, config.num_classes, config.num_image_tokens) == (32, 5, 16)
    assert (config.tokens_per_group, config.hidden_size, config.num_hidden_layers) == (4, 64, 3)
    assert (config.resid_dropout, config.ffn_dropout) == (0.2, 0.3)
    assert (config.token_dropout, config.class_dropout) == (0.4, 0.5)


def test_defaults_are_those_of_the_method():
    config = DARConfig()
    assert (config.codebook_size, config.num_classes) == (16384, 1000)
    assert (config.num_image_tokens, config.tokens_per_group) == (256, 32)
    assert [config.resid_dropout, config.ffn_dropout, config.token_dropout, config.class_dropout] == [0.1] * 4
    assert config.attention_dropout == 0
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 10000.0)
    assert not (config.attention_bias or config.mlp_bias or config.tie_word_embeddings)
    assert config.eos_token_id is None  # every code may end an image


def test_vocabulary_is_codes_classes_and_one_null_class():
    config = DARConfig(codebook_size=32, num_classes=5, num_image_tokens=16)
    assert config.vocab_size == 38
    assert [config.class_token_id(label) for label in range(5)] == [32, 33, 34, 35, 36]
    assert config.null_token_id == 37
    assert config.max_position_embeddings == 17  # the class token and the codes


def test_save_and_load(tmp_path):
    config = DARConfig(codebook_size=48, num_classes=7, rope_theta=500.0, class_dropout=0.3, token_dropout=0)
    config.save_pretrained(tmp_path)
    for loaded in (DARConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is DARConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert loaded.rope_parameters["rope_theta"] == 500.0
        assert (loaded.vocab_size, loaded.null_token_id) == (56, 55)


def test_other_configurations_and_missing_ones_are_refused(tmp_path):
    """transformers would take its defaults for what they do not say."""
    with pytest.raises(OSError, match="no config.json"):
        DARConfig.from_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a llama, not a 'dar' language model"):
        DARConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="holds a AutoencoderKL"):
        DARConfig.from_pretrained(tmp_path)


def test_vocabulary_follows_changed_options(tmp_path):
    DARConfig(codebook_size=48, num_classes=7).save_pretrained(tmp_path)
    config = DARConfig.from_pretrained(tmp_path, num_classes=3, num_image_tokens=64)
    assert (config.vocab_size, config.max_position_embeddings) == (52, 65)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_size": 0}, "codebook_size must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_image_tokens": -1}, "num_image_tokens must be at least 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"num_attention_heads": -1}, "num_attention_heads must be at least 1"),
        ({"tokens_per_group": 0}, "tokens_per_group must be at least 1"),
        ({"resid_dropout": 1.0}, r"resid_dropout must lie in \[0, 1\)"),
        ({"ffn_dropout": -0.1}, r"ffn_dropout must lie in \[0, 1\)"),
        ({"token_dropout": float("nan")}, r"token_dropout must lie in \[0, 1\)"),
        ({"attention_dropout": 7.0}, r"attention_dropout must lie in \[0, 1\)"),
        ({"class_dropout": 1.1}, r"class_dropout must lie in \[0, 1\]"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must divide"),
        ({"head_dim": 3}, "head_dim=3 must be even"),
        ({"head_dim": 0}, "head_dim=0 must be even"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is impossible"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        DARConfig(**options)


@pytest.mark.parametrize("label", [-1, 5, 1.0, "1", True, None])
def test_bad_class_label(label):
    with pytest.raises(ValueError, match=r"class label must be an integer in \[0, 5\)"):
        DARConfig(num_classes=5).class_token_id(label)
