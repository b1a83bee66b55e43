"""What a person looks at: ``pictures`` draws cases and training curves, ``page`` collects them in one HTML file."""

RESEARCH_USE = (
    "For research use only. kitseg is not a medical device: "
    "not for diagnosis, treatment or any other decision about a patient."
)
