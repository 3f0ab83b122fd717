//! All sessions as the API server has them, looked up again and again.

use std::{collections::HashMap, sync::Arc, time::Duration};

use ambient_testing::operator::Operator;
use reqwest::{Method, StatusCode};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// Longest time that a look counts: the API server may have been stopped meanwhile.
const LOOK: Duration = Duration::from_secs(2);

/// Phase of each session by its id, as last seen. Clones share it.
#[derive(Clone)]
pub struct Book(watch::Receiver<Page>);

#[derive(Clone, Default)]
struct Page {
    phases: Arc<HashMap<String, String>>,
    /// For how long the API server has answered so far.
    answered: Duration,
}

impl Book {
    /// Looks until `quit`.
    pub fn open(operator: Operator, quit: CancellationToken, tasks: &mut JoinSet<()>) -> Self {
        let (page, book) = watch::channel(Page::default());
        tasks.spawn(async move {
            let looking = async {
                loop {
                    let began = Instant::now();
                    let seen = look(&operator).await;
                    sleep(PAUSE).await;
                    if let Some(seen) = seen {
                        page.send_modify(|page| {
                            page.phases = Arc::new(seen);
                            page.answered += began.elapsed().min(LOOK);
                        });
                    }
                }
            };
            quit.run_until_cancelled(looking).await;
        });
        Self(book)
    }

    /// A session's phase; none when it is not there.
    pub fn phase(&self, id: &str) -> Option<String> {
        self.0.borrow().phases.get(id).cloned()
    }

    /// Waits until a session is as wanted; gives what it was last when that takes too long. Time in
    /// which the API server does not answer does not count.
    pub async fn until(
        &self,
        id: &str,
        limit: Duration,
        wanted: impl Fn(Option<&str>) -> bool,
    ) -> Result<(), Option<String>> {
        let mut book = self.0.clone();
        let is_reached = |page: &Page| wanted(page.phases.get(id).map(String::as_str));
        let until = book.borrow().answered + limit;
        let seen = book.wait_for(|page| is_reached(page) || page.answered > until);
        match seen.await {
            Ok(page) if is_reached(&page) => Ok(()),
            _ => Err(self.phase(id)),
        }
    }
}

/// All pages; none when there is no answer.
async fn look(operator: &Operator) -> Option<HashMap<String, String>> {
    let mut all = HashMap::new();
    for page in 1.. {
        let path = format!("/sessions?size=1000&orderBy=id&page={page}");
        let answer = operator.try_request(Method::GET, &path, None).await;
        let (StatusCode::OK, list) = answer.ok()? else {
            return None;
        };
        let items = list["items"].as_array()?;
        for session in items {
            let phase = session["phase"].as_str().unwrap_or_default();
            all.insert(session["id"].as_str()?.to_owned(), phase.to_owned());
        }
        if items.len() < 1000 {
            break;
        }
    }
    Some(all)
}
