"""A look at records before anything is trained on them. look.py takes it; page.py writes it down."""

from deltaw.runs.survey.look import Lengths, Rendered, Survey, survey
from deltaw.runs.survey.page import survey_report

__all__ = ["Lengths", "Rendered", "Survey", "survey", "survey_report"]
