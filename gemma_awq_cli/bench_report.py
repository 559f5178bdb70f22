"""The page of a bench: one HTML file that needs nothing else, written from the document and the artifacts' reports."""
