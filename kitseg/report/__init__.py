"""Reports: PNG pictures of cases and training curves, and self-contained HTML pages."""

RESEARCH_USE = (
    "For research use only. kitseg is not a medical device: "
    "not for diagnosis, treatment or any other decision about a patient."
)
