use tokio::{task::JoinSet, time::advance};

use super::*;

const HOME: [u8; 4] = [10, 0, 0, 1];
const AWAY: [u8; 4] = [10, 0, 0, 2];

/// Places, and tasks that have them: one second passes between one and the next.
struct Scene {
    seats: Seats,
    tasks: JoinSet<()>,
}

impl Scene {
    fn new(places: usize) -> Self {
        Self {
            seats: Seats::new(places),
            tasks: JoinSet::new(),
        }
    }

    async fn take(&mut self, network: impl Into<IpAddr>) -> Arc<Seat> {
        advance(Duration::from_secs(1)).await;
        let seat = Arc::new(Seat::new(network.into(), Instant::now()));
        let task = self.tasks.spawn(std::future::pending());
        self.seats.take(task.id(), Arc::clone(&seat));
        seat
    }

    async fn idle(&mut self, network: impl Into<IpAddr>) -> Arc<Seat> {
        let seat = self.take(network).await;
        seat.asked();
        seat.answered();
        seat
    }

    async fn busy(&mut self, network: impl Into<IpAddr>) -> Arc<Seat> {
        let seat = self.take(network).await;
        seat.asked();
        seat
    }
}

fn has_left(seat: &Seat) -> bool {
    seat.doing().0 == Doing::Left
}

#[tokio::test(start_paused = true)]
async fn who_has_waited_longest_leaves_first_and_idle_ones_before() {
    let mut scene = Scene::new(4);
    let busy = scene.busy(HOME).await;
    let old = scene.take(HOME).await;
    let young = scene.take(HOME).await;
    let idle = scene.idle(HOME).await;
    for (leaves, stays) in [(&idle, &old), (&old, &young), (&young, &busy)] {
        assert!(scene.seats.have_room_for(HOME.into()));
        assert!(has_left(leaves) && !has_left(stays));
        scene.busy(HOME).await;
    }
    // Nobody who is being answered.
    assert!(!scene.seats.have_room_for(HOME.into()));
    assert!(!has_left(&busy));
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_an_answer_counts_from_then() {
    let mut scene = Scene::new(4);
    let again = scene.idle(HOME).await;
    let first = scene.take(HOME).await;
    advance(Duration::from_secs(1)).await;
    again.heard();
    assert_eq!(again.doing(), (Doing::Head, Instant::now()));
    // More of it changes nothing.
    advance(Duration::from_secs(1)).await;
    again.heard();
    assert_eq!(again.doing().1 + Duration::from_secs(1), Instant::now());

    assert_eq!(scene.seats.make_room(Some(HOME.into())), 1);
    assert!(has_left(&first) && !has_left(&again));
}

#[tokio::test(start_paused = true)]
async fn a_network_over_its_share_makes_room_for_the_others() {
    let mut scene = Scene::new(8);
    let others = scene.idle(AWAY).await;
    let mut flood = Vec::new();
    for _ in 0..7 {
        flood.push(scene.take(HOME).await);
    }
    // For a newcomer from elsewhere, and for one of its own.
    for (newcomer, leaves) in [(AWAY, 0), (HOME, 1)] {
        assert_eq!(scene.seats.make_room(Some(newcomer.into())), 1);
        assert!(has_left(&flood[leaves]));
        assert!(!has_left(&others));
    }
}

#[tokio::test(start_paused = true)]
async fn a_network_over_its_share_takes_no_place_of_others() {
    let mut scene = Scene::new(4);
    let others = scene.idle(AWAY).await;
    for _ in 0..3 {
        scene.busy(HOME).await;
    }
    assert_eq!(scene.seats.make_room(Some(HOME.into())), 0);
    assert!(!has_left(&others));
    assert_eq!(scene.seats.make_room(Some([10, 0, 0, 3].into())), 1);
    assert!(has_left(&others));
}

#[tokio::test(start_paused = true)]
async fn one_network_alone_may_have_all_places() {
    let mut scene = Scene::new(4);
    let mut taken = Vec::new();
    for _ in 0..4 {
        assert!(scene.seats.have_room_for(HOME.into()));
        taken.push(scene.take(HOME).await);
    }
    assert!(!taken.iter().any(|seat| has_left(seat)));
}

#[tokio::test(start_paused = true)]
async fn many_places_are_made_free_in_batches() {
    let mut scene = Scene::new(256);
    for _ in 0..256 {
        scene.take(HOME).await;
    }
    assert_eq!(scene.seats.make_room(Some(AWAY.into())), 4);
    // Also where descriptors are short and nobody in particular comes.
    assert_eq!(scene.seats.make_room(None), 4);
}

#[tokio::test(start_paused = true)]
async fn of_a_few_who_wait_not_all_leave() {
    // As when descriptors are short long before places are.
    let mut scene = Scene::new(4096);
    let mut waiting = Vec::new();
    for _ in 0..16 {
        waiting.push(scene.take(HOME).await);
    }
    assert_eq!(scene.seats.make_room(None), 2);
    let left = waiting.iter().map(|seat| has_left(seat));
    assert_eq!(left.filter(|left| *left).count(), 2);
    assert!(has_left(&waiting[0]) && has_left(&waiting[1]));
}

#[tokio::test(start_paused = true)]
async fn a_place_that_was_taken_back_stays_so() {
    let mut scene = Scene::new(1);
    let seat = scene.take(HOME).await;
    assert_eq!(scene.seats.make_room(None), 1);
    seat.asked();
    seat.answered();
    seat.heard();
    assert!(has_left(&seat));
    // Its task ends later.
    let task = scene.tasks.spawn(std::future::pending()).id();
    scene.seats.free(task);
    assert!(scene.seats.networks.is_empty());
}

#[test]
fn a_state_is_one_number() {
    for doing in [Doing::Idle, Doing::Head, Doing::Answer, Doing::Left] {
        for since in [0, 1, 1 << 40] {
            let since = Duration::from_micros(since);
            assert_eq!(decode(encode(doing, since)), (doing, since));
        }
    }
}
