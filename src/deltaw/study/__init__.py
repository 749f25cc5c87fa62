"""What a run showed: metrics, evaluation, charts and the report. Nothing here changes a model or prints."""
