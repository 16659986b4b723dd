"""From notebooks to reports: canonical sources, runner, figures, tables, headline, front page."""
