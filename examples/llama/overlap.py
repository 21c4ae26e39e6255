"""How near texts are to their references: BLEU, NIST, METEOR, ROUGE, CIDEr.

BLEU is SacreBLEU's, NIST and METEOR are NLTK's, ROUGE is Google's. No kept library has
CIDEr; it follows its paper here. Except for BLEU and ROUGE, which have their own, words
are those of mteval-v13a in lower case. The scripts of data sets split words in ways of
their own, so that their figures differ in the last digits.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import sacrebleu
from nltk.corpus import wordnet
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

ROUGE = ("rouge1", "rouge2", "rougeL")
_ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0  # of CIDEr-D's penalty of another length

Words = list[str]
Grams = Counter[tuple[str, ...]]


def likeness(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """All scores of texts, of each of which there is at least one reference.

    NIST has no upper limit, CIDEr's is 10, that of all others is 1. METEOR is left out
    where NLTK has no WordNet (`python -m nltk.downloader wordnet`).
    """
    split = Tokenizer13a()

    def words(text: str) -> Words:
        return split(text.lower()).split()

    found = [words(text) for text in texts]
    expected = [[words(text) for text in same] for same in references]
    scores = {"bleu": bleu(texts, references), "nist": nist(found, expected)}
    if has_wordnet():
        pairs = zip(expected, found, strict=True)
        scores["meteor"] = fmean(meteor_score(same, text) for same, text in pairs)
    return {**scores, **rouge(texts, references), "cider": cider(found, expected)}


def has_wordnet() -> bool:
    """Whether NLTK finds the words that METEOR takes as equal."""
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return False
    return True


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Of the corpus, up to four words."""
    most = max(map(len, references))
    # One list a number of the reference; a text with fewer has none there.
    streams = [[x[i] if i < len(x) else None for x in references] for i in range(most)]
    return sacrebleu.corpus_bleu(texts, streams).score / 100  # type: ignore[arg-type]


def nist(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Of the corpus, up to five words."""
    longest = max(map(len, texts))
    return corpus_nist(references, texts, n=min(5, longest)) if longest else 0.0


def rouge(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Mean F measures, of the nearest reference, of stems."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    found = [
        scorer.score_multi(same, text)
        for same, text in zip(references, texts, strict=True)
    ]
    return {name: fmean(score[name].fmeasure for score in found) for name in ROUGE}


def cider(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    r"""CIDEr-D of the corpus (Vedantam et al. 2015, equations 1 to 4).

    .. math::
      10 \operatorname{mean}_{i, n} \operatorname{mean}_j
      \exp \frac{-(l_i - l_{ij})^2}{2 \sigma^2}
      \frac{\min(g^n_i, g^n_{ij}) \cdot g^n_{ij}}{\|g^n_i\| \|g^n_{ij}\|}

    with g the counts of n words, each times the log of the share of texts in whose
    references it is not, n from 1 to 4, l the lengths and sigma 6. Counts are not
    divided by the length, as the penalty of repetitions asks for, and as in the
    authors' code.
    """
    counts = {n: [[_grams(x, n) for x in same] for same in references] for n in _ORDERS}
    scores = []
    for n, of_all in counts.items():
        seen = Counter(gram for same in of_all for gram in set().union(*same))
        for text, same, own in zip(texts, references, of_all, strict=True):
            g = _weighted(_grams(text, n), seen, len(texts))
            parts = [
                math.exp(-((len(text) - len(x)) ** 2) / (2 * _SIGMA**2))
                * _clipped_cosine(g, _weighted(grams, seen, len(texts)))
                for x, grams in zip(same, own, strict=True)
            ]
            scores.append(fmean(parts))
    return 10 * fmean(scores)


def _grams(words: Words, n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _weighted(grams: Grams, seen: Grams, texts: int) -> dict[tuple[str, ...], float]:
    return {
        gram: count * math.log(texts / max(1, seen[gram]))
        for gram, count in grams.items()
    }


def _clipped_cosine(
    a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]
) -> float:
    norms = math.hypot(*a.values()) * math.hypot(*b.values())
    both = a.keys() & b.keys()
    return sum(min(a[x], b[x]) * b[x] for x in both) / norms if norms else 0.0
