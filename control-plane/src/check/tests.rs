//! The table.

use super::*;

#[test]
fn the_table_is_aligned_and_one_line_each() {
    let report = Report {
        rows: vec![
            Row::ok("API token", "from there"),
            Row::note("API server REST", "a\nb"),
            Row::failed("keys", "mend them"),
        ],
    };
    assert_eq!(
        report.to_string(),
        "CHECK            RESULT  DETAIL\n\
         API token        ok      from there\n\
         API server REST  note    a b\n\
         keys             failed  mend them\n"
    );
    assert_eq!(report.exit_code(), 69);
    let fine = Report {
        rows: report.rows[..2].to_vec(),
    };
    assert_eq!(fine.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_hangs_is_a_failure() {
    let row = limited("it", std::future::pending()).await;
    assert_eq!(row.outcome, Outcome::Failed);
    assert!(row.detail.contains("30s"), "{row:?}");
}
