"""Reports: PNG pictures of cases and training curves, and self-contained HTML pages."""

RESEARCH_USE = (
    "For research use only. kitseg is not a medical device: "
    "not for diagnosis, treatment or any other decision about a patient."
)

#: What a level of quality means for a reader.
LEVEL_TEXTS = {
    "green": "No doubt about the outlines was found. It is no statement about disease.",
    "amber": "Review the outlines before using the measurements.",
    "red": "The outlines may be wrong: check and correct them before using the measurements.",
}


def as_sentence(remark: str) -> str:
    """A remark, such as a doubt, as a sentence of a page."""
    return f"{remark[:1].upper()}{remark[1:]}."
