"""How byte-level BPE cuts text into words before merging, by the file's ``tokenizer.ggml.pre``.

The patterns are those of the models' own tokenizers, written for Oniguruma and checked against llama.cpp on
every name of the table. They run one after the other, each on the pieces that the one before left; what lies
between two matches is a piece too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_LOG = logging.getLogger(__name__)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# Not (?i:...): that would take the long s (U+017F) for an s.
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_WORD = rf"{_LEAD}\p{{L}}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_QWEN35 = rf"{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_MINICPM5 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTION}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_HALVES = "|".join(rf"\s{{{size}}}(?!\S)" for size in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
_JAIS2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|{_HALVES}|\s"


def _camel(categories: str, contraction: str) -> str:
    """Words that end where a lower-case letter is followed by an upper-case one; letters beyond ASCII count as both."""
    letters = "".join(rf"\p{{{category}}}" for category in categories)
    upper, lower = f"[{letters}&&[^a-z]]", f"[{letters}&&[^A-Z]]"
    return rf"{_LEAD}{upper}*{lower}+{contraction}|{_LEAD}{upper}+{lower}*{contraction}"


_TEKKEN = rf"{_camel('L', '')}|\p{{N}}|{_PATHS}|{_SPACES}"
_GPT4O = rf"{_camel('L', _CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
_GRANITE_MULTI = rf"{_camel('LM', _CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
_MARKED_WORD = rf"{_LEAD}[\p{{L}}\p{{M}}]+{_CONTRACTION}?"
_AYA = rf"{_MARKED_WORD}|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"{_MARKED_WORD}|\p{{N}}|{_PATHS}|{_SPACES}",
)
# Digits in threes from the right; the text before them stays with the first ones (later patterns part the two).
_THREES_LEFT = r"(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})*(?!\p{N}))"
_THREES = rf"\P{{N}}*+(?:{_THREES_LEFT}|\p{{N}}{{3}})|\P{{N}}+"
_ASCII_LEFT = r"(?:[^0-9]|(?<![0-9])[0-9]{1,2}(?=(?:[0-9]{3})*(?![0-9])))"
_SUPERBPE = (r"\p{N}+", rf"{_ASCII_LEFT}+|[0-9]{{3}}{_ASCII_LEFT}*")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_LINES = r"[^\n]+|\n+"
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "IMGIMG[A-I]{1,4}Z",
    "[\\t\\n]|    |  ",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_EAST = r"[[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]&&\S]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002]+",
    r"(?<!\s)\s+\z",  # looked for where white space begins only, or long runs of it would take for ever
    _EAST,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST, r"\p{N}")
_TAGGED_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_TAGGED = rf"{_TAGGED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_DEEPSEEK_V3 = (r"\p{N}{1,3}", _CJK, _TAGGED)
_SPARK = (r"\p{N}{1,3}", _CJK, rf"{_TAGGED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_KIMI_WORD = r"[\p{L}&&[^\p{Han}]]+"
_KIMI_K2 = rf"\p{{Han}}+|{_LEAD}{_KIMI_WORD}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """One behaviour and the names it goes by.

    ``whole_words``: a word that is a token is taken as it is, without merging. ``add_bos``: whether BOS comes first
    where the file does not say; ``always_bos``: whatever it says. ``bytewise``: the vocabulary is spelled in letters that
    stand for bytes, otherwise in characters. ``whole_newlines``: a run of newlines that is a token is not merged.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    always_bos: bool = False
    bytewise: bool = True
    whole_newlines: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The splitter of the ``tokenizers`` library: the patterns in turn, then bytes to letters."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        letters = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)] if self.bytewise else []
        return pre_tokenizers.Sequence([*splits, *letters])


_TABLE = (
    PreTokenizer(("default",), _DEFAULT),
    PreTokenizer(
        (
            *("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "gigachat", "a.x-4.0", "mellum", "modern-bert"),
            *("jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe"),
            *("trillion", "granite-docling"),
        ),
        (_GPT2,),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "command-r", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", _GPT2),
    ),
    PreTokenizer(
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
        (_LLAMA3,),
        whole_words=True,
        add_bos=True,
    ),
    PreTokenizer(("glm4", "glm5"), (_LLAMA3,), whole_words=True),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe"), (_LLAMA3,)),
    PreTokenizer(("jais-2",), (_JAIS2,)),
    PreTokenizer(("minicpm5",), (r"\p{N}{1,3}", _MINICPM5), whole_words=True),
    PreTokenizer(
        (
            *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
            "grok-2",
        ),
        (_QWEN2,),
    ),
    PreTokenizer(("qwen35",), (_QWEN35,)),
    PreTokenizer(("laguna",), (_LINES, _QWEN2)),
    PreTokenizer(("ufakzeka",), (_UFAKZEKA,)),
    PreTokenizer(("seed-coder",), (_SEED_CODER,)),
    PreTokenizer(("bailingmoe", "bailingmoe2", "llada-moe"), (_BAILING,)),
    PreTokenizer(("exaone-moe",), (_EXAONE_MOE,)),
    PreTokenizer(("tekken",), (_TEKKEN,), whole_words=True, add_bos=True),
    PreTokenizer(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_GPT4O,)),
    PreTokenizer(("granite-embed-multi-97m",), (_GRANITE_MULTI,), whole_words=True),
    PreTokenizer(("tiny_aya", "cohere2moe"), (_THREES, _AYA)),
    PreTokenizer(("youtu",), _YOUTU, whole_words=True),
    PreTokenizer(("superbpe",), _SUPERBPE),
    PreTokenizer(("deepseek-llm",), _DEEPSEEK_LLM),
    PreTokenizer(("deepseek-coder",), _DEEPSEEK_CODER),
    PreTokenizer(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _DEEPSEEK_V3),
    PreTokenizer(("spark2_5",), _SPARK),
    PreTokenizer(("afmoe",), (_THREES, _ASIAN, _TAGGED)),
    PreTokenizer(("kimi-k2",), (_KIMI_K2,)),
    PreTokenizer(("falcon",), _FALCON),
    PreTokenizer(("bloom", "poro-chat", "gpt3-finnish"), (_BLOOM,)),
    PreTokenizer(("viking",), (_BLOOM, r"\p{N}")),
    PreTokenizer(("chameleon",), _CHAMELEON, add_bos=True),
    PreTokenizer(
        ("gemma4", "granite-embed-multi-311m"), (_LINES,), always_bos=True, bytewise=False, whole_newlines=True
    ),
    PreTokenizer(("sarvam-moe",), (_LINES,), bytewise=False),
)
PRE_TOKENIZERS = {name: row for row in _TABLE for name in row.names}


def pre_tokenizer_named(name: str) -> PreTokenizer:
    """The row of the table for a ``tokenizer.ggml.pre``; for a name that is not in it a warning, and ``default``."""
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        _LOG.warning(
            "tokenizer.ggml.pre: %r is not known, so text is cut as for 'default' and output will be worse; known are %s",
            name[:80],
            known,
        )
    return PRE_TOKENIZERS.get(name, PRE_TOKENIZERS["default"])
