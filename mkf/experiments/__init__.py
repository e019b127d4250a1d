"""What papers and documentation show, one file per table or figure; `mkf reproduce` runs them."""
