"""What a user would run without mkf, written as well as that library allows. Tests check that peers agree with us."""
