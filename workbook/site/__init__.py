"""The report site: results gathered from the metrics, executed notebooks as pages, a front page."""
