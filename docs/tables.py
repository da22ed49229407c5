"""Cells of tables: numbers stay whole, long names break between words, sentences have room."""

import re

from docutils import nodes

#: A number with a negative exponent, or a range of numbers.
NUMBER = re.compile(r"\(?\d[\d.,]*(?:e-\d+)?-?[\d.,]*(?:e-\d+)?\)?")
#: Where a name may break: before a capital letter, and in the longest after an underscore.
BREAK = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=_)(?=\w{12})")
#: Words that are shorter do not break.
LONG = 14
#: A cell with more characters has sentences.
SENTENCE = 50


def fit_cells(app, doctree):
    """Mark the numbers, the long names and the sentences in the tables of a page."""
    for entry in doctree.findall(nodes.entry):
        if len(entry.astext()) > SENTENCE:
            entry["classes"].append("sentence")
        for text in list(entry.findall(nodes.Text)):
            if isinstance(text.parent, nodes.paragraph):  # not of code and formulas
                text.parent.replace(text, marked(str(text)))


def marked(text):
    """Return a text as nodes, in which the browser knows where it may break."""
    found = []
    for word in re.split(r"(\s+)", text):
        if "-" in word and NUMBER.fullmatch(word):
            found.append(nodes.inline("", word, classes=["number"]))
        elif len(word) >= LONG:
            for part in BREAK.split(word):
                found += [nodes.Text(part), nodes.raw("", "<wbr>", format="html")]
        else:
            found.append(nodes.Text(word))
    return found
