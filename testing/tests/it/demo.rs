//! `local --demo`: what a newcomer sees first.

use ambient_testing::programs::Program;

#[tokio::test]
async fn demo_ends_well_and_shows_both_ways() {
    let mut demo = Program::new("ambient-control-plane")
        .args(["local", "--demo"])
        .start();
    // Step by step, as each has a deadline of its own; the first makes a keypair too.
    for word in ["Pending", "Running", "Completed"] {
        demo.output_line(word).await;
    }
    let status = demo.wait().await;
    let shown = [demo.output(), demo.log()].concat().join("\n");
    assert!(status.success(), "{status}\n{shown}");
    for word in ["Pending", "Running", "Completed"] {
        assert!(shown.contains(word), "no {word} in\n{shown}");
    }
    for way in ["pull", "push"] {
        let renewals = shown.lines().filter(|line| line.contains(way)).count();
        assert!(renewals >= 2, "{renewals} renewals by {way} in\n{shown}");
    }
}
