//! A request body that goes upstream as it comes, and is kept while it is small.
//!
//! A request that the API server refuses for its token is sent once more with a fresher one: first
//! what was kept, then what still comes, so that a gRPC stream that waits for its first answer can
//! be sent again too. More than [`MOST_KEPT`] is not kept, and the request not repeated.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::serve::BoxError;

/// Most bytes of one body that are kept: the requests of an API are rarely larger.
pub(crate) const MOST_KEPT: usize = 64 * 1024;

/// Most bytes kept for all requests together; beyond, requests are not repeated.
const MOST_KEPT_BY_ALL: usize = 4 * 1024 * 1024;

/// What all bodies together may keep.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST_KEPT_BY_ALL)))
    }
}

/// One request's body, from which it is sent once or twice.
pub(crate) struct Kept<B = Incoming>(Arc<Mutex<State<B>>>);

/// The body of one of the two requests to the API server.
pub(crate) struct Outgoing<B = Incoming> {
    state: Arc<Mutex<State<B>>>,
    /// Which of the requests: only the latest may take from the client.
    turn: u8,
    /// Whether what was kept was sent (always so in the first request).
    caught_up: bool,
    trailers_sent: bool,
}

struct State<B> {
    incoming: B,
    turn: u8,
    kept: BytesMut,
    trailers: Option<HeaderMap>,
    /// Of the request that waits for the client's next bytes.
    waiting: Option<Waker>,
    /// None once too much came.
    permit: Option<OwnedSemaphorePermit>,
    budget: Budget,
}

#[derive(Debug, thiserror::Error)]
#[error("the request is sent again")]
struct SentAgain;

impl<B> Kept<B> {
    /// Keeps what comes from `incoming`, as `budget` allows.
    pub(crate) fn new(incoming: B, budget: &Budget) -> Self {
        Self(Arc::new(Mutex::new(State {
            incoming,
            turn: 0,
            kept: BytesMut::new(),
            trailers: None,
            waiting: None,
            permit: Arc::clone(&budget.0).try_acquire_many_owned(0).ok(),
            budget: budget.clone(),
        })))
    }

    /// The body of the first request.
    pub(crate) fn first(&self) -> Outgoing<B> {
        Outgoing {
            state: Arc::clone(&self.0),
            turn: lock(&self.0).turn,
            caught_up: true,
            trailers_sent: false,
        }
    }

    /// The body of another request, which begins anew; none when too much came to be kept. The
    /// one before gets nothing more.
    pub(crate) fn again(&self) -> Option<Outgoing<B>> {
        let mut state = lock(&self.0);
        state.permit.as_ref()?;
        state.turn += 1;
        // The one before learns that it is over; else its connection would wait for ever.
        if let Some(waiting) = state.waiting.take() {
            waiting.wake();
        }
        Some(Outgoing {
            state: Arc::clone(&self.0),
            turn: state.turn,
            caught_up: false,
            trailers_sent: false,
        })
    }
}

fn lock<B>(state: &Mutex<State<B>>) -> MutexGuard<'_, State<B>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B> State<B> {
    fn keep(&mut self, data: &Bytes) {
        let Some(permit) = &mut self.permit else {
            return;
        };
        let fits = self.kept.len() + data.len() <= MOST_KEPT;
        let more = u32::try_from(data.len())
            .ok()
            .filter(|_| fits)
            .and_then(|more| Arc::clone(&self.budget.0).try_acquire_many_owned(more).ok());
        if let Some(more) = more {
            permit.merge(more);
            // A copy: a part of the connection's buffer would keep all of it.
            self.kept.extend_from_slice(data);
        } else {
            self.permit = None;
            self.kept = BytesMut::new();
        }
    }
}

impl<B> Body for Outgoing<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let mut state = lock(&this.state);
        if state.turn != this.turn {
            return Poll::Ready(Some(Err(SentAgain.into())));
        }
        if !this.caught_up {
            this.caught_up = true;
            if !state.kept.is_empty() {
                let kept = state.kept.clone().freeze();
                return Poll::Ready(Some(Ok(Frame::data(kept))));
            }
        }
        if this.turn > 0
            && !this.trailers_sent
            && let Some(trailers) = state.trailers.clone()
        {
            this.trailers_sent = true;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        match Pin::new(&mut state.incoming).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    state.keep(data);
                } else if let Some(trailers) = frame.trailers_ref() {
                    state.trailers = Some(trailers.clone());
                    this.trailers_sent = true;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                state.waiting = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let state = lock(&self.state);
        let waiting = !self.caught_up && !state.kept.is_empty();
        let trailers = self.turn > 0 && !self.trailers_sent && state.trailers.is_some();
        !waiting && !trailers && state.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let state = lock(&self.state);
        let waiting = if self.caught_up {
            0
        } else {
            state.kept.len() as u64
        };
        let rest = state.incoming.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(waiting));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(waiting));
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body_util::BodyExt as _;
    use proptest::prelude::*;

    use super::*;

    /// Frames that are there at once.
    struct Frames(VecDeque<Frame<Bytes>>);

    impl Body for Frames {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty()
        }
    }

    fn frames(chunks: &[Vec<u8>], trailers: bool) -> Frames {
        let mut frames: VecDeque<_> = chunks
            .iter()
            .map(|chunk| Frame::data(Bytes::copy_from_slice(chunk)))
            .collect();
        if trailers {
            let mut map = HeaderMap::new();
            map.insert("x-end", http::HeaderValue::from_static("yes"));
            frames.push_back(Frame::trailers(map));
        }
        Frames(frames)
    }

    async fn take(body: &mut Outgoing<Frames>, frames: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        for _ in 0..frames {
            match body.frame().await {
                Some(Ok(frame)) => {
                    taken.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
                }
                Some(Err(error)) => panic!("{error}"),
                None => break,
            }
        }
        taken
    }

    #[tokio::test]
    async fn the_first_request_gets_nothing_once_the_second_has_begun() {
        let kept = Kept::new(frames(&[vec![1], vec![2]], false), &Budget::default());
        let mut first = kept.first();
        take(&mut first, 1).await;
        let mut second = kept.again().unwrap();
        assert!(first.frame().await.unwrap().is_err());
        assert_eq!(take(&mut second, 9).await, [1, 2]);
    }

    #[tokio::test]
    async fn what_all_keep_together_is_bounded_and_given_back() {
        let budget = Budget::default();
        let chunk = vec![0; MOST_KEPT];
        let mut all = Vec::new();
        for _ in 0..MOST_KEPT_BY_ALL / MOST_KEPT {
            let kept = Kept::new(frames(std::slice::from_ref(&chunk), false), &budget);
            take(&mut kept.first(), 9).await;
            all.push(kept);
        }
        assert!(all.iter().all(|kept| kept.again().is_some()));
        let one_more = Kept::new(frames(&[vec![1]], false), &budget);
        take(&mut one_more.first(), 9).await;
        assert!(one_more.again().is_none());
        drop(all);
        let later = Kept::new(frames(&[vec![1]], false), &budget);
        take(&mut later.first(), 9).await;
        assert!(later.again().is_some());
    }

    proptest! {
        /// However a body is cut and wherever the first request stops: the second is whole, or
        /// there is none because it was too large.
        #[test]
        fn a_second_request_is_whole_or_not_made(
            sizes in prop::collection::vec(0..40_000_usize, 0..8),
            taken in 0..10_usize,
            trailers: bool,
        ) {
            let chunks: Vec<Vec<u8>> = sizes.iter().enumerate()
                .map(|(index, size)| vec![u8::try_from(index).unwrap(); *size])
                .collect();
            let whole = chunks.concat();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let kept = Kept::new(frames(&chunks, trailers), &Budget::default());
                let seen = take(&mut kept.first(), taken).await;
                prop_assert!(whole.starts_with(&seen));
                match kept.again() {
                    Some(body) => {
                        prop_assert!(seen.len() <= MOST_KEPT);
                        let collected = body.collect().await.unwrap();
                        prop_assert_eq!(collected.trailers().is_some(), trailers);
                        prop_assert_eq!(&collected.to_bytes()[..], &whole[..]);
                    }
                    None => prop_assert!(seen.len() > MOST_KEPT),
                }
                Ok(())
            })?;
        }
    }
}
